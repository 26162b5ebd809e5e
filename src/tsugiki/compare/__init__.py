"""Studies: methods x learning rates x seeds on one base and several data sets, a folder that resumes itself, and a report."""
from tsugiki.compare.runner import compare
from tsugiki.compare.study import Cell, Study, Variant, study_of

__all__ = ["Cell", "Study", "Variant", "compare", "study_of"]

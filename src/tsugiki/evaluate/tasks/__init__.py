"""Tasks as data: what is asked, of which rows, how an answer is scored. `load` finds one, `score` scores a model on it."""
from tsugiki.evaluate.tasks.spec import Spec, builtin
from tsugiki.evaluate.tasks.task import Task, load, score, scoring

__all__ = ["Spec", "Task", "builtin", "load", "score", "scoring"]

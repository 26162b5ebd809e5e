"""The demo command's own promises: `--again` starts anew and touches nothing else, and "improved" is a claim that can fail."""
from __future__ import annotations

import pytest

from tsugiki.cli.demo import forget, improved
from tsugiki.errors import UserError
from tsugiki.evaluate.score import Score, wilson


def test_again_deletes_the_earlier_demo_and_only_that(tmp_path):
    out = tmp_path / "demo"
    (out / "run" / "checkpoints").mkdir(parents=True)
    (out / "run" / "run.yaml").write_text("train: {}\n")
    (out / "merged").mkdir()
    (out / "mine.txt").write_text("kept")
    forget(out)
    assert sorted(p.name for p in out.iterdir()) == ["mine.txt"]
    forget(tmp_path / "never was")


def test_again_refuses_a_folder_that_holds_no_demo_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no run"):
        forget(tmp_path)
    assert (tmp_path / "run" / "thesis.txt").exists()


@pytest.mark.parametrize(("before", "after", "expected"), [
    (0, 100, True), (40, 92, True), (0, 28, True),       # 28 of 100 cannot be chance when 0 were right
    (0, 1, False), (0, 3, False), (2, 5, False),         # more than double, and still nothing
    (0, 0, False), (50, 60, False), (30, 20, False)])
def test_a_task_has_improved_only_beyond_both_intervals(before, after, expected):
    def score(hits):
        return Score("accuracy", hits / 100, 100, 1.0, wilson(hits, 100))
    assert improved(score(before), score(after)) is expected

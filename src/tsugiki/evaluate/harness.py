"""lm-evaluation-harness on this engine: its tasks, by name or from a folder, scored with a base or any adapter."""
from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from tsugiki.data.render import Renderer
from tsugiki.errors import RunError, UserError, nearest


@dataclass(frozen=True)
class Results:
    """What the harness found: task -> {"acc,none": 0.5, "acc_stderr,none": ..., ...} in its own words, and rows a task."""
    tasks: dict[str, dict]
    samples: dict[str, int]

    def plain(self) -> dict:
        return {"harness": self.tasks, "n": self.samples}

    def lines(self) -> list[tuple[str, str, float, float | None, int]]:
        """(task, metric, value, standard error or None, rows)."""
        found = []
        for task, values in self.tasks.items():
            for key, value in values.items():
                metric, _, how = key.partition(",")
                if isinstance(value, float | int) and how and not metric.endswith("_stderr"):
                    error = values.get(f"{metric}_stderr,{how}")
                    found.append((task, metric if how == "none" else f"{metric} ({how})", float(value),
                                  error if isinstance(error, float) else None, self.samples.get(task, 0)))
        return found


def needed() -> None:
    """UserError where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("--harness needs lm-evaluation-harness: pip install 'tsugiki[eval]'")


def run_harness(model: nn.Module, renderer: Renderer, tasks: Sequence[str], include_path: str | None = None,
                limit: int | None = None, batch_size: int = 32, max_length: int | None = None) -> Results:
    """Run harness tasks on `model` as it is routed now. include_path: a folder of task YAML files of your own; limit: rows a task.

    Raises UserError for a task that is not known or whose data cannot be had, RunError where the harness itself fails.
    """
    needed()
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path: no folder {include_path}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tsugiki.evaluate.harness_model import HarnessModel
    own = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    manager = own if own and all(t in own.all_tasks for t in tasks) else TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(f"--harness {task}: no such task{nearest(task, manager.all_tasks)}; --include-path DIR adds your own")
    was_training = model.training
    model.eval()
    try:
        out = simple_evaluate(HarnessModel(model, renderer, batch_size, max_length), tasks=list(tasks), task_manager=manager,
                              limit=limit, bootstrap_iters=1000, log_samples=False)
    except UserError:
        raise
    except (OSError, ConnectionError, FileNotFoundError) as e:
        raise UserError(f"--harness {' '.join(tasks)}: its data cannot be had: {_first(e)}") from None
    except (ValueError, KeyError, AssertionError, RuntimeError, TypeError) as e:
        raise RunError(f"the harness failed: {type(e).__name__}: {_first(e)}") from e
    finally:
        model.train(was_training)
    return Results({t: {k: v for k, v in values.items() if k != "alias"} for t, values in out["results"].items()},
                   {t: n["effective"] for t, n in out.get("n-samples", {}).items()})


def _first(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]

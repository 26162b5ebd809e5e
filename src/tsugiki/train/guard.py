"""The forgetting guard: the loss on held-out source text may rise so far above what it was before training, and no further."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tsugiki.config import TrainConfig
from tsugiki.train.sources import SOURCE

if TYPE_CHECKING:
    from tsugiki.train.loop import Progress


def rise(before: dict, after: dict) -> float | None:
    """How far the source loss has risen, relative to before; None where it is not measured."""
    if SOURCE not in before or SOURCE not in after:
        return None
    return after[SOURCE]["loss"] / before[SOURCE]["loss"] - 1


class Guard:
    """Warns once, or stops the run, when the last evaluation is beyond the limit. What it remembers is in `progress`."""

    def __init__(self, cfg: TrainConfig, progress: Progress):
        self.cfg, self.progress = cfg, progress

    @property
    def stops(self) -> bool:
        return self.cfg.forgetting == "stop"

    def look(self, say: Callable[[str], None]) -> None:
        progress, cfg = self.progress, self.cfg
        found = rise(progress.sources_before, progress.sources_after)
        if cfg.forgetting == "off" or found is None or found <= cfg.forgetting_limit:
            return
        line = f"the source loss is {found:.1%} above what it was, the limit is {cfg.forgetting_limit:.1%} (train.forgetting_limit)"
        if self.stops:
            progress.stopped = f"at step {progress.step} {line}"
        elif not progress.warned:
            progress.warned = True
            say(f"step {progress.step}: {line}; replay keeps it lower (data.replay)")


def told(sources: dict, cfg: TrainConfig) -> str:
    """`source loss 3.971 -> 4.102 (+3.3%, limit 5.0%)`, or nothing where it was not measured; `sources` as in a Result."""
    if SOURCE not in sources:
        return ""
    before, after = ({SOURCE: sources[SOURCE][when]} for when in ("before", "after"))
    allowed = "" if cfg.forgetting == "off" else f", limit {cfg.forgetting_limit:.1%}"
    return f"source loss {before[SOURCE]['loss']:.3f} -> {after[SOURCE]['loss']:.3f} ({rise(before, after):+.1%}{allowed})"

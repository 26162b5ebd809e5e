"""How a job of a joint run fails: alone, with one line that says why."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tsugiki.errors import RunError, UserError
from tsugiki.memory import out_of_memory


@dataclass(frozen=True)
class Failure:
    """A job that stopped alone: why, after how many steps; what it had until then is in its folder."""
    out: Path
    reason: str
    step: int = 0
    begun: bool = False

    def plain(self) -> dict:
        return {"out": str(self.out), "failed": self.reason, "steps": self.step}


def reason_of(error: BaseException) -> str:
    """Why, in one line."""
    if out_of_memory(error):
        return "out of memory"
    line = next(iter(str(error).splitlines()), "")[:300]
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename or ''}{': ' if error.filename else ''}{error.strerror}"
    return line if isinstance(error, (UserError, RunError, OSError)) and line else f"{type(error).__name__}: {line}"


def bare(error: Exception) -> Exception:
    """Without its traceback, which holds what the failed forward had made."""
    return error.with_traceback(None)

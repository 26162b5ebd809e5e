"""Small text tables for the commands."""
from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned; numbers to the right."""
    cells = [[str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [all(_numeric(row[i]) for row in cells[1:]) for i in range(len(head))]
    lines = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
             for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _numeric(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("%", "").replace("-", "").replace("+", "").strip().isdigit()


def score_line(score: dict) -> str:
    """`accuracy 0.812 (0.785 to 0.836, n 872), loss 0.412, perplexity 1.5`."""
    metric = score["metric"]
    parts = []
    if metric != "loss":
        low_high = score.get("interval")
        span = f"{low_high[0]:.3f} to {low_high[1]:.3f}, " if low_high else ""
        parts.append(f"{metric} {score[metric]:.3f} ({span}n {score['n']})")
    parts.append(f"loss {score['loss']:.3f}, perplexity {score['perplexity']:.4g}" + ("" if parts else f", n {score['n']}"))
    return ", ".join(parts)


def before_after(before: dict, after: dict) -> str:
    rows = [(key, f"{before[key]:.3f}" if key in before else "-", f"{after[key]:.3f}")
            for key in ("accuracy", "bleu", "loss", "perplexity") if key in after]
    return table(("held out", "before", "after"), rows) + f"\nn {after['n']}" + (
        "   95 % interval {:.3f} to {:.3f}".format(*after["interval"]) if after.get("interval") else "")

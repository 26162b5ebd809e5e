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
    metric, rest = score["metric"], ("loss", "perplexity")
    span = "{:.3f} to {:.3f}, ".format(*score["interval"]) if score.get("interval") else ""
    parts = [f"{metric} {score[metric]:.3f} ({span}n {score['n']})"]
    parts += [f"{key} {score[key]:.3f}" for key in ("bleu", "rouge_l", "held_out_loss") if key in score and key != metric]
    parts += [f"{key} {score[key]:.4g}" if key == "perplexity" else f"{key} {score[key]:.3f}" for key in rest if key != metric]
    parts += [f"the most frequent answer alone {score['majority']:.3f}"] if "majority" in score else []
    return ", ".join(parts) + _unanswered(score, ", ")


def _unanswered(score: dict, between: str) -> str:
    return f"{between}{score['unanswered']} rows too long for the model, counted as wrong" if score.get("unanswered") else ""


def paired_line(pair) -> str:
    """`accuracy +0.050 (0.010 to 0.090), 12 rows better, 2 worse of 240, p 0.013 (exact McNemar)`."""
    span = " ({:+.3f} to {:+.3f})".format(*pair.interval) if pair.interval else ""
    return (f"{pair.metric} {pair.difference:+.3f}{span}, {pair.better} rows better, {pair.worse} worse of {pair.n}, "
            f"p {pair.p:.3g} ({pair.test})")


def before_after(before: dict, after: dict) -> str:
    from tsugiki.train.scoring import SCORES
    rows = [(key, f"{before[key]:.3f}" if key in before else "-", f"{after[key]:.3f}") for key in SCORES if key in after]
    return table(("score", "before", "after"), rows) + f"\nn {after['n']}" + (
        "   95 % interval {:.3f} to {:.3f}".format(*after["interval"]) if after.get("interval") else "") + _unanswered(after, "   ")

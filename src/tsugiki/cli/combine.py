"""`tsugiki combine`: several adapters of one base into one LoRA, with the error of every site."""
from __future__ import annotations

import argparse
import math
from pathlib import Path

HELP = """Make one LoRA out of the weighted changes of several adapters, of any methods that change weights.

  tsugiki combine --base ./my-model --adapter runs/a/adapter=0.7 --adapter runs/b/adapter=0.3 --rank 16 --out both

--how linear (the default) sums the changes; svd is the same where a rank must be given; cat puts the factors of LoRAs side by
side; ties, dare, dare_ties and magnitude drop numbers of each change first and need --density, the share they keep. Without
--rank the LoRA gets the rank that the change has. What is lost to the rank is printed, relative to the change; of every
site with --json.
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    p = commands.add_parser("combine", help="several adapters into one LoRA", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR[=WEIGHT]",
                   help="an adapter folder, ours or Hugging Face PEFT's, and its weight (1); given once an adapter")
    p.add_argument("--how", default="linear", help="linear, svd, cat, ties, dare, dare_ties or magnitude (%(default)s)")
    p.add_argument("--rank", type=int, help="of the new LoRA (default: the change's own)")
    p.add_argument("--density", type=float, help="share of the numbers that ties, dare, dare_ties and magnitude keep")
    p.add_argument("--seed", type=int, default=0, help="of dare's draws (%(default)s)")
    p.add_argument("--out", required=True, metavar="DIR", help="the new adapter's folder")
    common(p)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.combine import check
    from tsugiki.errors import UserError
    from tsugiki.load import EMBEDDED
    if not args.adapter:
        raise UserError("--adapter: missing; give the adapter folders to combine, as DIR=WEIGHT")
    if (out := Path(args.out)).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {args.out}: is there already; give the name of a new folder")
    check(args.how, args.rank, args.density)           # before a model is loaded
    given = [_weight(text) for text in args.adapter]
    args.adapter = [text for text, _ in given]
    loaded = load_with_adapters(args, dtype=args.dtype or "fp32")
    weights = dict(zip(loaded.notes, (w for _, w in given), strict=True))
    new = next(n for n in ("combined", *(f"combined-{i}" for i in range(len(weights)))) if n not in weights)
    report = loaded.adapters.combine(new, weights, how=args.how, rank=args.rank, density=args.density, seed=args.seed)
    notes = [{k: v for k, v in note.items() if k != "stop_ids"} for note in loaded.notes.values()]
    note = {k: v for k, v in notes[0].items() if all(k in n and n[k] == v for n in notes)}       # what all were trained with
    stops = sorted({i for n in loaded.notes.values() for i in n["stop_ids"]})
    loaded.adapters.save(new, args.out, stop_ids=stops, base=args.base or EMBEDDED, extra=note)
    worst = max(report.sites, key=report.sites.get)
    emit(args, {"out": args.out, "how": args.how, "weights": weights, "rank": report.rank, "error": report.error,
                "sites": report.sites},
         f"a LoRA of rank {report.rank} on {len(report.sites)} sites written to {args.out}; {report.error:.2%} of the change "
         f"is lost to its rank\n(most at {worst}: {report.sites[worst]:.2%})")
    return 0


def _weight(text: str) -> tuple[str, float]:
    """"DIR=0.7" -> ("DIR", 0.7); a folder whose name ends like that is itself."""
    from tsugiki.errors import UserError
    folder, sign, tail = text.rpartition("=")
    if not sign or Path(text).is_dir():
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return text, 1.0                               # NAME=DIR
    if not math.isfinite(weight):
        raise UserError(f"--adapter {text}: the weight must be a number, got {tail}")
    return folder, weight

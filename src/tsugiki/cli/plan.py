"""`tsugiki plan`: parameters, files, memory and time of a method, before a run."""
from __future__ import annotations

import argparse
import re

from tsugiki.errors import UserError

HELP = """What a run will need, for one method or all: trained parameters, memory at the peak of a step, the size of the result
and of a checkpoint, time per 1,000 tokens. No weights are loaded: a step is rehearsed on shapes, and the machine's speed measured.

  tsugiki plan --base ./my-model
  tsugiki plan --base ./my-model --method lora --set method.rank=16 --tokens 8192 --length 1024
  tsugiki plan --matrix 300x300 --set method.rank=2       LoRA's arithmetic on one matrix: 90,000 numbers, or 1,200
"""
NOTE = ("memory: weights, moments, and the rest (activations, gradients) at the peak of a step of {tokens:,} tokens; "
        "the process holds its libraries and what its allocator keeps besides")
HEAD = ("method", "trained", "share", "memory MB", "weights", "moments", "rest", "result MB", "checkpoint MB", "s per 1,000 tokens")


def add(commands) -> None:
    from tsugiki.cli.main import common
    p = commands.add_parser("plan", help="parameters, memory and time, before a run", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--method", help="one method (default: all)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the method, as method.rank=16")
    p.add_argument("--tokens", type=int, default=4096, help="tokens of one forward, as train.max_tokens (%(default)s)")
    p.add_argument("--length", type=int, help="tokens of a row (default: 512, or what the base takes at most)")
    p.add_argument("--trained", type=float, default=1.0, help="share of the tokens that are trained on (%(default)s)")
    p.add_argument("--matrix", metavar="DxK", help="count LoRA on one matrix instead of a model")
    common(p)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    from tsugiki.config import assignments
    keys = assignments(args.set)
    values = keys.get("method", {})
    if strange := [k for k in keys if k != "method"] or ([] if isinstance(values, dict) else ["method"]):
        raise UserError(f"--set {strange[0]}: plan takes fields of the method only, as method.rank=16")
    name = args.method or (values.pop("name", None) if values else None) or ("lora" if values else None)
    values = {k: v for k, v in values.items() if k != "name"}
    return matrix(args, name, values) if args.matrix else methods(args, name, values)


def matrix(args: argparse.Namespace, name: str | None, values: dict) -> int:
    """LoRA's arithmetic on one matrix."""
    from tsugiki.cli.main import emit
    from tsugiki.methods import make
    from tsugiki.plan import lora_parameters
    found = re.fullmatch(r"(\d+)x(\d+)", args.matrix)
    if not found:
        raise UserError(f"--matrix {args.matrix}: expected DxK, as 300x300")
    d, k = map(int, found.groups())
    if not d * k:
        raise UserError(f"--matrix {args.matrix}: both sides must be at least 1")
    if name not in (None, "lora"):
        raise UserError(f"--matrix counts LoRA, not {name}")
    rank = make("lora", **values).rank
    count = lora_parameters(k, d, rank)
    emit(args, {"d": d, "k": k, "rank": rank, "full": d * k, "lora": count},
         f"a {d} x {k} matrix has {d * k:,} parameters; LoRA of rank {rank} trains d*r + r*k = {count:,} "
         f"({count / (d * k):.2%})")
    return 0


def methods(args: argparse.Namespace, name: str | None, values: dict) -> int:
    """One method on a model, or all: a line each. Of all, one that this base cannot take gets a line that says why."""
    from tsugiki.cli.main import emit
    from tsugiki.load import EMBEDDED, compute_dtype, device_of
    from tsugiki.methods import METHODS, make
    from tsugiki.plan import plan
    from tsugiki.train.log import Bar
    device = device_of(args.device or "auto")
    dtype, base = compute_dtype(args.dtype or "auto", device), args.base or EMBEDDED
    plans, refused, names = [], {}, [name] if name else list(METHODS)
    with Bar("plan", len(names), quiet=args.quiet or len(names) == 1, every=10.0) as bar:
        for done, n in enumerate(names, 1):
            try:
                plans.append(plan(base, make(n, **(values if n == name else {})), tokens=args.tokens, length=args.length,
                                  trained=args.trained, dtype=dtype, device=str(device), trust_remote_code=args.trust_remote_code))
            except UserError as e:
                if name or not e.args[0].startswith(f"{n}:"):         # about the base, not the method
                    raise
                refused[n] = str(e)
            bar.update(done, n)
    emit(args, {"base": base, "tokens": plans[0].tokens if plans else 0, "plans": [p.plain() for p in plans], "refused": refused},
         _text(plans, refused))
    return 0


def _text(plans: list, refused: dict[str, str]) -> str:
    from tsugiki.cli.tables import table
    mb = 1 << 20
    rows = [(p.method, f"{p.trainable:,}", f"{p.trainable / p.total:.3%}", f"{p.memory / mb:,.0f}", f"{p.weights / mb:,.0f}",
             f"{p.optimizer / mb:,.1f}", f"{p.activations / mb:,.0f}", f"{p.saved / mb:,.2f}", f"{p.checkpoint / mb:,.2f}",
             f"{p.seconds:.3g}") for p in plans]
    notes = [NOTE.format(tokens=plans[0].tokens)] if plans else []
    notes += [f"{p.method}: could not be rehearsed on shapes; copies of few layers were run" for p in plans if not p.rehearsed]
    return "\n".join([*([table(HEAD, rows)] if plans else []), *notes, *(f"not on this base: {why}" for why in refused.values())])

"""`tsugiki plan`: parameters and memory of a method, before a run."""
from __future__ import annotations

import argparse
import re

from tsugiki.errors import UserError

HELP = """What a run will need: trained parameters, memory, checkpoint size, for one method or all.

  tsugiki plan --base ./my-model
  tsugiki plan --base ./my-model --method lora --set method.rank=16
  tsugiki plan --matrix 300x300 --set method.rank=2       LoRA's arithmetic on one matrix: 90,000 numbers, or 1,200
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    p = commands.add_parser("plan", help="parameters and memory, before a run", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--method", help="one method (default: all)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the method, as method.rank=16")
    p.add_argument("--tokens", type=int, default=4096, help="tokens of one forward (%(default)s)")
    p.add_argument("--matrix", metavar="DxK", help="count LoRA on one matrix instead of a model")
    common(p)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.tables import table
    from tsugiki.config import assignments
    from tsugiki.load import EMBEDDED, compute_dtype, device_of
    from tsugiki.methods import METHODS, make
    from tsugiki.plan import lora_parameters, plan
    keys = assignments(args.set)
    values = keys.get("method", {})
    if strange := [k for k in keys if k != "method"] or ([] if isinstance(values, dict) else ["method"]):
        raise UserError(f"--set {strange[0]}: plan takes fields of the method only, as method.rank=16")
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: must be at least 1")
    name = args.method or (values.pop("name", None) if values else None) or ("lora" if values else None)
    values = {k: v for k, v in values.items() if k != "name"}
    if args.matrix:
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
    width = compute_dtype(args.dtype or "auto", device_of(args.device or "auto")).itemsize
    plans = [plan(args.base or EMBEDDED, make(n, **(values if n == name else {})), tokens=args.tokens, width=width,
                  trust_remote_code=args.trust_remote_code) for n in ([name] if name else METHODS)]
    gb = 1 << 30
    rows = [(p.method, f"{p.trainable:,}", f"{p.trainable / p.total:.3%}", f"{p.memory / gb:.2f}", f"{p.weights / gb:.2f}",
             f"{p.optimizer / gb:.2f}", f"{p.activations / gb:.2f}", f"{p.checkpoint / 2**20:,.1f}") for p in plans]
    emit(args, {"base": args.base or EMBEDDED, "plans": [p.plain() for p in plans]},
         f"{plans[0].total:,} parameters; memory is an estimate for {args.tokens:,} tokens a forward\n" +
         table(("method", "trained", "share", "memory GB", "weights", "optimizer", "activations", "checkpoint MB"), rows))
    return 0

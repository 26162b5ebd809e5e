"""`tsugiki methods`: what each method can do, probed now, on this machine."""
from __future__ import annotations

import argparse

from tsugiki.errors import UserError

HELP = """What each method can do. Every answer is found by doing it on a tiny model, at the method's default settings:

  tsugiki methods                              the table: yes, no, FAILS (wrong here: a bug), or not installed
  tsugiki methods --why                        and the reason of each no
  tsugiki methods --method lora --why          one method
  tsugiki methods --base ./my-model            and what each would train on a model, at which rate, and the size of its file
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    p = commands.add_parser("methods", help="what each method can do, probed", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--method", action="append", default=[], metavar="NAME", help="one method; may be given again (default: all)")
    p.add_argument("--why", action="store_true", help="the reason of every answer that is not yes")
    p.add_argument("--base", default=None, help="also what each trains on this model, at which learning rate, and its file's size")
    p.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    common(p, base=False)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    from tsugiki.capabilities import PROPERTIES, about, capabilities
    from tsugiki.cli.main import emit
    from tsugiki.methods import METHODS
    from tsugiki.train.log import Bar
    names = tuple(dict.fromkeys(args.method)) or tuple(METHODS)
    sizes = {name: _size(args, name) for name in names} if args.base and not set(names) - METHODS.keys() else {}
    with Bar("probe", len(names) * len(PROPERTIES), quiet=args.quiet) as bar:
        found = capabilities(names, tell=lambda done, total, what: bar.update(done, what))
    failed = [f"{n} {key}" for n, answers in found.items() for key, a in answers.items() if a.says == "FAILS"]
    emit(args, {"methods": {n: {"lr": METHODS[n].lr, "small_lr": METHODS[n].small_lr, "about": about(METHODS[n])[1]} |
                            sizes.get(n, {}) | {"properties": {key: vars(a) for key, a in answers.items()}}
                            for n, answers in found.items()},
                "properties": {key: p.means for key, p in PROPERTIES.items()}, "failed": failed}, _text(found, sizes, args.why))
    return 1 if failed else 0


def _size(args: argparse.Namespace, name: str) -> dict:
    from tsugiki.capabilities import size
    from tsugiki.methods import make
    try:
        found = size(args.base, make(name), args.trust_remote_code)
    except UserError as e:
        if not str(e).startswith(f"{name}:"):         # about the base, not the method
            raise
        return {"trainable": None, "file_bytes": None, "rate": None, "refused": str(e)}
    return {"trainable": found.trainable, "file_bytes": found.file, "rate": found.rate}


def _text(found: dict, sizes: dict, why: bool) -> str:
    from tsugiki.capabilities import PROPERTIES
    from tsugiki.cli.tables import table
    head = ["method", *(p.head for p in PROPERTIES.values()), *(["trained", "file MB", "rate"] if sizes else [])]
    rows = []
    for name, answers in found.items():
        row = [name, *(answers[key].says for key in PROPERTIES)]
        if sizes:
            trained, size, rate = (sizes[name][key] for key in ("trainable", "file_bytes", "rate"))
            row += ["-"] * 3 if trained is None else [f"{trained:,}", f"{size / 2**20:,.2f}", f"{rate:g}"]
        rows.append(row)
    notes = [f"{name}: {PROPERTIES[key].head}: {a.why}" for name, answers in found.items() for key, a in answers.items()
             if a.why and (why or a.says == "FAILS")]
    notes += [f"not on this base: {size['refused']}" for size in sizes.values() if "refused" in size]
    return "\n".join([table(head, rows), *([""] if notes else []), *notes])

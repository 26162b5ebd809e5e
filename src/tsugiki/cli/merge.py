"""`tsugiki merge`: adapter and base into one plain transformers folder, checked against the unmerged model."""
from __future__ import annotations

import argparse

HELP = """Fold an adapter into its base: a plain transformers folder that needs nothing of Tsugiki.

  tsugiki merge --base ./my-model --adapter runs/first/adapter --out merged

Sums are made in float64 and rounded once. The folder is loaded again and its logits compared with the unmerged model's;
the error is printed relative to the adapter's own effect, and above --limit the folder is not kept.
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    from tsugiki.cli.models import adapter_flags
    p = commands.add_parser("merge", help="fold an adapter into its base", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    p.add_argument("--limit", type=float, default=0.1, help="largest error relative to the adapter's effect (%(default)s)")
    adapter_flags(p)
    common(p)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.errors import UserError
    from tsugiki.formats.export import merge_to_folder
    from tsugiki.load import DTYPES, EMBEDDED, stored_dtype
    if not args.adapter:
        raise UserError("--adapter: missing; give the adapter folder to merge")
    asked = args.dtype or "auto"
    if not args.limit >= 0:
        raise UserError(f"--limit {args.limit}: must be a number from 0 up")
    if asked not in (*DTYPES, "auto"):
        raise UserError(f"--dtype {asked}: allowed: auto (as the base is stored), {', '.join(DTYPES)}")
    dtype = stored_dtype(args.base or EMBEDDED) if asked == "auto" else DTYPES[asked]
    loaded = load_with_adapters(args, dtype="fp32")
    stops = sorted({i for name in loaded.notes for i in loaded.stop_ids(name)})
    templates = {loaded.renderer(name).template for name, note in loaded.notes.items() if note.get("kind") == "chat"}
    report = merge_to_folder(loaded.model, loaded.tokenizer, loaded.adapters, list(loaded.notes), args.out, dtype=dtype,
                             limit=args.limit, stop_ids=stops, template=templates.pop() if len(templates) == 1 else None)
    emit(args, report, f"merged into {args.out} ({report['dtype']}); checked: reloaded logits differ from the unmerged model's by "
                       f"{report['max_error']:.2e} at most,\n{report['relative_error']:.2%} of the adapter's own effect "
                       f"(weights: {report['weight_error']:.2%} of the change lost to rounding)")
    return 0

"""`tsugiki convert`: an adapter's folder in the other form, or a loralib checkpoint as a PEFT folder."""
from __future__ import annotations

import argparse
from pathlib import Path

from tsugiki.errors import UserError

HELP = """Write an adapter in another form, its numbers as they are, or as a LoRA.

  tsugiki convert --adapter runs/first/adapter --base ./my-model --to native --out adapter-native
  tsugiki convert --adapter runs/oft/adapter --base ./my-model --method lora --rank 16 --out oft-as-lora
  tsugiki convert --adapter roberta_mnli.bin --from loralib --alpha 16 --leave-out '^classifier' --out mnli-lora

--to peft writes Hugging Face PEFT's keys and fields, --to native ours. The folder is read back and compared bit for bit.

--method lora makes a LoRA of any method whose change is a change of weights: the best of that rank, by SVD. Without --rank it
has the rank of the change. What is lost is printed, relative to the change; of every site with --json.

--from loralib reads a checkpoint of microsoft/LoRA's loralib (`lora_A`, `lora_B`) without unpickling it, and writes a folder
for PEFT. The file does not hold alpha. The scripts of microsoft/LoRA use
  RoBERTa-base, MNLI           r=8   --alpha 16
  RoBERTa-large, SST-2         r=8   --alpha 16
  DeBERTa-v2-XXLarge, MNLI     r=16  --alpha 32
  GPT-2 medium, E2E            r=4   --alpha 32 --enable-lora 1,0,1 (q and v of c_attn)
Other tensors in the file, a trained head for one, are named and refused unless --leave-out says to convert without them.
The base is not loaded; what --base says is kept in the folder as the base's name.
"""
LORALIB = ("alpha", "leave_out", "rename", "enable_lora", "fused")      # flags of --from loralib alone


def add(commands) -> None:
    from tsugiki.cli.main import common
    p = commands.add_parser("convert", help="an adapter in another form; loralib checkpoints for PEFT", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--adapter", required=True, metavar="PATH", help="an adapter folder, or with --from a checkpoint file")
    p.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    p.add_argument("--to", choices=("peft", "native"), help="the form to write (with --from loralib always peft)")
    p.add_argument("--method", choices=("lora",), help="another method to write it as: lora")
    p.add_argument("--rank", type=int, help="of the LoRA that --method lora makes (default: the change's own)")
    p.add_argument("--from", dest="source", choices=("loralib",), help="what the file is, where it is no adapter folder")
    p.add_argument("--alpha", type=float, help="loralib: lora_alpha of the training; the change is alpha / r * B A")
    p.add_argument("--leave-out", metavar="REGEX", help="loralib: tensors not to convert, searched in their names")
    p.add_argument("--rename", action="append", default=[], metavar="FROM=TO",
                   help="loralib: another beginning for module names; may be given again")
    p.add_argument("--enable-lora", metavar="1,0,1", help="loralib: which parts of a fused weight were trained (MergedLinear)")
    p.add_argument("--fused", metavar="REGEX", help="loralib: which modules --enable-lora is about (default: c_attn, qkv, ...)")
    common(p)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    if (out := Path(args.out)).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {args.out}: is there already; give the name of a new folder")
    if args.source == "loralib":
        return _loralib(args)
    given = [f"--{name.replace('_', '-')}" for name in LORALIB if getattr(args, name) not in (None, [])]
    if given:
        raise UserError(f"{given[0]}: only with --from loralib")
    if args.method and args.to:
        raise UserError("--to: a LoRA that --method makes is written in the form it has; leave --to out")
    if args.rank is not None and not args.method:
        raise UserError("--rank: only with --method lora")
    if not args.method and not args.to:
        raise UserError("--to: missing; allowed: peft, native (or --method lora, or --from loralib for a checkpoint file)")
    if Path(args.adapter).is_file():
        raise UserError(f"--adapter {args.adapter}: is a file; give an adapter folder, or --from loralib for its checkpoints")
    return _lora(args) if args.method else _form(args)


def _lora(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.combine import check
    from tsugiki.load import EMBEDDED
    check("linear", args.rank, None)
    named = argparse.Namespace(**vars(args) | {"adapter": [f"adapter={args.adapter}"]})
    loaded = load_with_adapters(named, dtype=args.dtype or "fp32")
    old, note = loaded.adapters.get("adapter"), dict(loaded.notes["adapter"])
    report, stops = loaded.adapters.convert("adapter", "lora", rank=args.rank), note.pop("stop_ids")
    loaded.adapters.save("lora", args.out, stop_ids=stops, base=args.base or EMBEDDED, extra=note)
    worst = max(report.sites, key=report.sites.get)
    emit(args, {"out": args.out, "method": "lora", "from": old.cfg.name, "rank": report.rank, "error": report.error,
                "sites": report.sites},
         f"{old.cfg.name} written to {args.out} as a LoRA of rank {report.rank} on {len(report.sites)} sites; {report.error:.2%} "
         f"of its change is lost to the rank\n(most at {worst}: {report.sites[worst]:.2%})")
    return 0


def _form(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.formats.forms import convert, form_of
    from tsugiki.load import EMBEDDED
    if (Path(args.adapter) / "adapter_config.json").is_file() and form_of(args.adapter) == args.to:
        raise UserError(f"--to {args.to}: {args.adapter} is in that form already")      # before a model is loaded
    loaded = load_with_adapters(argparse.Namespace(**vars(args) | {"adapter": [f"adapter={args.adapter}"]}))
    report = convert(loaded.adapters.get("adapter"), args.adapter, args.out, args.to, base=args.base or EMBEDDED)
    emit(args, report, f"{report['method']} on {report['sites']} sites ({report['parameters']:,} numbers) written to {args.out} "
                       f"in the {args.to} form; it reads back to the same bits")
    return 0


def _loralib(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.formats.loralib import FUSED, convert
    if args.to == "native":
        raise UserError("--to native: a loralib checkpoint is written as peft; convert that folder with --base and --to native")
    if args.alpha is None:
        raise UserError("--alpha: missing; a loralib file does not hold it (--help names the known recipes')")
    if Path(args.adapter).is_dir():
        raise UserError(f"--adapter {args.adapter}: is a folder; --from loralib reads a checkpoint file")
    done = convert(args.adapter, args.out, args.alpha, leave_out=args.leave_out, rename=_renames(args.rename),
                   enable_lora=_enabled(args.enable_lora), fused=args.fused or FUSED, base=args.base)
    report = {"out": args.out, "form": "peft", "method": "lora", "alpha": args.alpha, "modules": list(done.modules),
              "ranks": sorted(set(done.ranks.values())), "left_out": list(done.left_out)}
    left = f"; left out: {', '.join(done.left_out)}" if done.left_out else ""
    emit(args, report, f"{len(done.modules)} modules of rank {', '.join(map(str, report['ranks']))} written to {args.out} "
                       f"for PEFT{left}")
    return 0


def _renames(texts: list[str]) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text:
            raise UserError(f"--rename {text}: must be FROM=TO, two beginnings of module names")
    return [(start, new) for start, _, new in (text.partition("=") for text in texts)]


def _enabled(text: str | None) -> list[bool] | None:
    parts = (text or "").split(",")
    if text is not None and (not set(parts) <= {"0", "1"} or "1" not in parts):
        raise UserError(f"--enable-lora {text}: must be a 1 or 0 for each part of the fused weight, at least one 1, as in 1,0,1")
    return None if text is None else [part == "1" for part in parts]

"""`tsugiki COMMAND`: parse, call the library, print. Exit codes: 0 done, 1 failed, 2 bad input, 128 + signal when stopped."""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from ctypes.util import find_library

from tsugiki.errors import RunError, UserError, nearest

EPILOG = ("Every flag is a key of the run's configuration; --config FILE.yaml and --set a.b=c set the same keys. "
          "See docs/configuration.md.")

HEAVY = ("demo", "train", "eval", "compare", "serve")                     # commands that compute for long


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and the nearest spelling; a flag is never guessed from its beginning."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0]
            flags = [f for a in self._actions for f in a.option_strings]
            message = f"unknown flag {word}{nearest(word, flags)}"
        raise UserError(f"{self.prog}: {message} (--help shows all)")


def emit(args: argparse.Namespace, values: dict, text: str = "") -> None:
    """The result on stdout: one JSON object with --json, else the text."""
    if args.json:
        print(json.dumps(values, ensure_ascii=False, default=str))
    elif text:
        print(text)


def parser() -> Parser:
    from tsugiki.cli import chat, combine, compare, convert, data, demo, eval, generate, merge, methods, plan, serve, train
    top = Parser(prog="tsugiki",
                 description="Fine-tune large language models. `tsugiki demo` shows the whole road in a few minutes.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, required=True)
    for module in (demo, train, compare, generate, chat, serve, eval, merge, combine, convert, methods, plan,
                   data):
        module.add(commands)
    return top


def common(p: argparse.ArgumentParser, base: bool = True, bits: bool = False) -> None:
    """Flags that most commands share; `bits` for those that run a base as it was loaded."""
    if base:
        p.add_argument("--base", default=None, help="model folder, hub id, or 'embedded' (the default)")
        p.add_argument("--device", default=None, help="cpu, cuda, or auto (the default)")
        p.add_argument("--dtype", default=None, help="bf16, fp32, or auto (the default: bf16 where the hardware multiplies it)")
        if bits:
            p.add_argument("--bits", type=int, default=None, help="store the base in 4 (NF4) or 8 bits; needs tsugiki[quant]")
        p.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout; progress goes to stderr")
    p.add_argument("--quiet", action="store_true", help="no progress")


def _with_tcmalloc() -> None:
    """Start over with tcmalloc, where it is installed: a CPU's training steps fault fewer pages (benchmarks/malloc.py). It must be
    there before the process begins, so once it is set this returns. TSUGIKI_ALLOCATOR=system leaves the allocator alone.
    """
    if sys.platform != "linux" or os.environ.get("LD_PRELOAD") or os.environ.get("TSUGIKI_ALLOCATOR") == "system":
        return
    name = find_library("tcmalloc_minimal") or find_library("tcmalloc")
    if name and sys.argv[1:2] and sys.argv[1] in HEAVY:
        os.environ["LD_PRELOAD"] = name
        os.execv(sys.executable, [sys.executable, "-m", "tsugiki.cli.main", *sys.argv[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        _with_tcmalloc()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        args, unknown = parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        _hush()
        return args.run(args) or 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"stopped: {e}", file=sys.stderr)
        return getattr(e, "code", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OSError as e:
        print(f"error: {e.filename or ''}{': ' if e.filename else ''}{e.strerror or e}", file=sys.stderr)
        return 1


def _hush() -> None:
    """transformers' own chatter is not the user's."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())

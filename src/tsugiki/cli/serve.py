"""`tsugiki serve`: many adapters on one base over HTTP, as OpenAI's API, and a page."""
from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from tsugiki.errors import UserError

HELP = """Serve a base and many adapters, of any methods, over OpenAI's API. Adapters answer in one batch, each as alone.

  tsugiki serve --base ./my-model --adapter math=runs/math/adapter --adapter style=runs/style/adapter
  tsugiki serve --base ./my-model --adapters-dir runs --key-file keys.txt --host 0.0.0.0

A client names an adapter, or the base, as its model:

  OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model="math", messages=...)

The page is at /, the API's description at /openapi.json, counts for Prometheus at /metrics.

Keys: a file with one a line, or TSUGIKI_KEY and TSUGIKI_ADMIN_KEY in the environment; never a flag, which others on the
machine can read. Beyond this machine (--host) a key is needed. TLS is a proxy's work.
With an admin key and --admin-root DIR, adapters below DIR are loaded, replaced and taken off while others answer
(POST /admin/adapters, PUT and DELETE /admin/adapters/NAME).
SIGTERM or Ctrl+C: requests that run are finished, then it exits with 0; a second one ends it at once.
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    from tsugiki.cli.models import adapter_flags
    p = commands.add_parser("serve", help="answer over HTTP with many adapters at once", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    adapter_flags(p)
    p.add_argument("--adapters-dir", metavar="DIR", help="every adapter folder in DIR, and the result of every run in it")
    p.add_argument("--name", help="what the base is called (default: its folder's name, or its hub id)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s); any but this machine's needs a key")
    p.add_argument("--port", type=int, default=8000, help="%(default)s; 0: any free one")
    p.add_argument("--key-file", metavar="F", help="keys of users, one a line")
    p.add_argument("--admin-key-file", metavar="F", help="keys of administrators, one a line")
    p.add_argument("--admin-root", action="append", default=[], metavar="DIR",
                   help="adapters are loaded over HTTP from below DIR alone; may be given again")
    p.add_argument("--slots", type=int, default=16, help="adapters attached at once; the others wait on disk (%(default)s)")
    p.add_argument("--batch", type=int, default=16, help="requests decoded at once (%(default)s)")
    p.add_argument("--queue", type=int, default=256, help="requests that may wait; more are refused with 429 (%(default)s)")
    p.add_argument("--max-tokens", type=int, default=1024, help="most new tokens of an answer (%(default)s)")
    p.add_argument("--timeout", type=float, default=300.0, help="most seconds of an answer (%(default)s)")
    p.add_argument("--grace", type=float, default=30.0, help="seconds that running requests have at the end (%(default)s)")
    common(p, bits=True)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    for name in ("starlette", "uvicorn"):
        if find_spec(name) is None:
            raise UserError(f"serve: needs {name}, which is not installed; pip install 'tsugiki[serve]'")
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_base
    from tsugiki.serve.asked import Models
    from tsugiki.serve.engine import Engine
    from tsugiki.serve.http import Service
    from tsugiki.serve.run import listen, serve
    setting, base, wanted = _setting(args), args.name or _base_name(args.base), _adapters(args)
    if base in wanted:
        raise UserError(f"--adapter {base}={wanted[base]}: that is the base's name; use NAME=DIR, or --name for the base")
    with listen(args.host, args.port) as sock:        # a port that is taken is told before the base is loaded
        model, tokenizer = load_base(args)
        engine = Engine(model, tokenizer, slots=args.slots, batch=args.batch, queue=args.queue)
        for name, folder in wanted.items():
            engine.add(name, folder)
        engine.start()
        host, port = sock.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def ready() -> None:
            emit(args, {"url": url, "models": [base, *wanted]},
                 f"{base} and {len(wanted)} adapters answer at {url}/v1; the page is {url}/")
            sys.stdout.flush()
        try:
            service = Service(Models(engine, tokenizer, base, model.get_input_embeddings().num_embeddings), setting)
            return serve(service.app, sock, args.grace, ready)
        finally:
            engine.stop(drain=False)


def _setting(args: argparse.Namespace):
    """What the server allows, checked before anything is loaded."""
    from tsugiki.serve.auth import Keys, read_keys
    from tsugiki.serve.http import Setting, hosts_of
    from tsugiki.serve.roots import allowed_roots
    from tsugiki.serve.run import is_loopback
    from tsugiki.serve.schema import Limits
    for flag in ("slots", "batch", "queue", "max_tokens", "timeout", "grace"):
        if not getattr(args, flag) >= 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    keys = Keys(read_keys(args.key_file, "TSUGIKI_KEY", "--key-file"),
                read_keys(args.admin_key_file, "TSUGIKI_ADMIN_KEY", "--admin-key-file"))
    if not is_loopback(args.host) and not keys.user:
        raise UserError(f"--host {args.host}: others can reach it there, so it needs a key; give --key-file or TSUGIKI_KEY")
    if args.admin_root and not keys.admin:
        raise UserError("--admin-root: goes with an admin key; give --admin-key-file or TSUGIKI_ADMIN_KEY")
    return Setting(limits=Limits(max_tokens=args.max_tokens, timeout=args.timeout), keys=keys, roots=allowed_roots(args.admin_root),
                   hosts=tuple(hosts_of(args.host)))


def _base_name(base: str | None) -> str:
    """What the base is called: embedded, the folder's name, or the hub id."""
    from tsugiki.load import EMBEDDED
    return Path(base).resolve().name if base and Path(base).expanduser().is_dir() else base or EMBEDDED


def _adapters(args: argparse.Namespace) -> dict[str, str]:
    """Name -> folder, of --adapter and of what lies in --adapters-dir."""
    from tsugiki.cli.models import folders, name_of
    found = folders(args.adapter)
    if args.adapters_dir is None:
        return found
    if not Path(args.adapters_dir).is_dir():
        raise UserError(f"--adapters-dir {args.adapters_dir}: no such folder")
    inside = [f for d in sorted(Path(args.adapters_dir).iterdir()) for f in (d, d / "adapter")
              if (f / "adapter_config.json").is_file() and not d.name.startswith(".")]
    if not inside:
        raise UserError(f"--adapters-dir {args.adapters_dir}: holds no folder with an adapter_config.json")
    for folder in inside:
        if (name := name_of(folder)) in found:
            raise UserError(f"--adapters-dir {args.adapters_dir}: {folder.name} would be called {name!r}, as another adapter is")
        found[name] = str(folder)
    return found

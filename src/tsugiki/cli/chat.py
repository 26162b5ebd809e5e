"""`tsugiki chat`: a conversation in the terminal; `/adapter NAME` switches in the middle of it."""
from __future__ import annotations

import argparse

HELP = """Talk to a model.

  tsugiki chat --base ./my-model --adapter math=runs/math/adapter --adapter style=runs/style/adapter

Commands: /adapter NAME (or none), /system TEXT, /reset, /help, /quit
"""


def add(commands) -> None:
    from tsugiki.cli.generate import sampling
    from tsugiki.cli.main import common
    from tsugiki.cli.models import adapter_flags
    p = commands.add_parser("chat", help="talk to a model", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--system", help="a system message")
    p.add_argument("--as", dest="kind", choices=("auto", "chat", "plain"), default="auto",
                   help="chat: through the chat template; plain: each line alone, as it is (default: as the adapter was trained)")
    sampling(p)
    adapter_flags(p)
    common(p, bits=True)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    from tsugiki.cli.generate import answer
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.data import Message
    from tsugiki.errors import UserError, nearest
    from tsugiki.evaluate.decode import Decoder
    loaded = load_with_adapters(args)
    adapter, system, history = next(iter(loaded.notes), None), args.system, []
    decoder = Decoder(loaded.model, steps=10 * args.max_new_tokens)          # some answers; how many nobody knows
    print(f"adapters: {', '.join(loaded.notes) or 'none'}; now {adapter or 'none'}. /help shows the commands, /quit ends.")
    while True:
        try:
            line = input(f"{adapter or 'base'}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return 0
        if command == "/adapter":
            name = rest.strip() or "none"
            if name == "none" or name in loaded.notes:
                adapter = None if name == "none" else name
                print(f"now {adapter or 'the base alone'}")
            else:
                print(f"no adapter {name!r}{nearest(name, loaded.notes)}; loaded: {', '.join(loaded.notes) or 'none'}")
        elif command == "/system":
            system, history = rest.strip() or None, []
        elif command == "/reset":
            history = []
        elif command.startswith("/"):
            print("/adapter NAME|none  /system TEXT  /reset  /quit")
        else:
            try:
                conversation = loaded.conversation(line.replace("\\n", "\n"), adapter, args.kind, system, history)
                said = answer(loaded, decoder, conversation, adapter, args, stream=True)
            except UserError as e:
                print(f"error: {e}")
                continue
            except KeyboardInterrupt:
                print("\n(stopped)")
                continue
            if conversation.kind == "chat":
                history += [conversation.messages[-2], Message("assistant", said)]

"""`tsugiki generate`: answers to prompts, streamed, or many at once."""
from __future__ import annotations

import argparse
import sys

from tsugiki.errors import UserError

HELP = """Answer prompts.

  tsugiki generate --base ./my-model --adapter runs/first/adapter --prompt "Review: a fine film Sentiment:"
  cat prompts.txt | tsugiki generate --adapter runs/first/adapter        (one prompt a line)
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    from tsugiki.cli.models import adapter_flags
    p = commands.add_parser("generate", help="answer prompts", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", action="append",
                   help="the prompt (\\n is a line break); may be given again; default: a prompt a line from stdin")
    p.add_argument("--as", dest="kind", choices=("auto", "chat", "plain"), default="auto",
                   help="chat: through the chat template; plain: the text as it is (default: as the adapter was trained)")
    sampling(p)
    adapter_flags(p)
    common(p, bits=True)
    p.set_defaults(run=run, parser=p)


def sampling(p: argparse.ArgumentParser) -> None:
    p.add_argument("--max-new-tokens", type=int, default=200, help="longest answer (%(default)s)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (the default)")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability")
    p.add_argument("--seed", type=int, default=0, help="of the sampling")


def options(args: argparse.Namespace, stop_ids: list[int], pad: int) -> dict:
    """Keyword arguments of transformers' generate."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature must be 0 or more, --top-p above 0 and at most 1")
    found = {"max_new_tokens": args.max_new_tokens, "eos_token_id": stop_ids, "pad_token_id": pad,
             "do_sample": args.temperature > 0}
    return found | ({"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {})


def answer(loaded, decoder, conversation, adapter: str | None, args: argparse.Namespace, stream: bool) -> str:
    """One answer by the Decoder; with `stream`, printed as it comes."""
    import torch
    from transformers import TextStreamer

    from tsugiki.evaluate.answers import room
    from tsugiki.load import pad_id
    renderer = loaded.renderer(adapter)
    prompt = renderer.prompt(conversation)
    limit = room(loaded.model)
    if not prompt:
        raise UserError("the prompt is empty and the tokenizer adds no beginning: there is nothing to continue")
    if limit and len(prompt) >= limit:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model takes {limit}")
    ids = torch.tensor([prompt], device=loaded.model.device)
    torch.manual_seed(args.seed)
    kw = options(args, loaded.stop_ids(adapter), pad_id(loaded.tokenizer))
    if limit:
        kw["max_new_tokens"] = min(kw["max_new_tokens"], limit - len(prompt))
    if stream:
        kw["streamer"] = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad(), loaded.adapters.use(adapter):
        out = decoder.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kw)
    return renderer.answer(out[0, len(prompt):].tolist())


def run(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.evaluate.decode import Decoder
    if len(args.adapter) > 1:
        raise UserError("generate takes one --adapter; `tsugiki chat` switches between several")
    prompts = [p.replace("\\n", "\n") for p in args.prompt] if args.prompt else [line.rstrip("\n") for line in sys.stdin]
    prompts = [p for p in prompts if p.strip()]
    if not prompts:
        raise UserError("--prompt: missing, and nothing came on stdin")
    loaded = load_with_adapters(args)
    adapter = next(iter(loaded.notes), None)
    stream = not args.json and not args.quiet
    answers, decoder = [], Decoder(loaded.model, steps=len(prompts) * args.max_new_tokens)
    for prompt in prompts:
        answers.append(answer(loaded, decoder, loaded.conversation(prompt, adapter, args.kind), adapter, args, stream))
    if not stream:
        emit(args, {"answers": [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]}, "\n".join(answers))
    return 0

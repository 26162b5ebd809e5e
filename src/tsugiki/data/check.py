"""Looking at data before training on it: every bad row, a summary, and what exactly is trained, token by token."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import median

from tsugiki.data.conversation import Columns, Conversation, collect
from tsugiki.data.render import Example, Renderer
from tsugiki.data.rows import Problem

COLOURS = ("\x1b[30;42m", "\x1b[30;46m")    # trained tokens, in turn, so that one sees where each begins
DIM, RESET = "\x1b[2m", "\x1b[0m"


def check(files: str | Path | Sequence[str | Path], format: str = "auto", columns: Columns | None = None,
          renderer: Renderer | None = None) -> tuple[list[Problem], dict]:
    """All problems of the files (with a renderer, also what it cannot render), and a summary of the good rows.

    Lengths are [smallest, median, largest] in characters, of prompts and of answers.
    """
    got = collect(files, format, columns)
    problems = list(got.problems)
    if renderer is not None:
        problems += renderer.problems(got.conversations)
    bad = {(p.file, p.line) for p in problems}
    good = [c for c in got.conversations if tuple(_place(c.where)) not in bad]
    summary = {
        "rows": len(good),
        "problems": len(problems),
        "formats": got.formats,
        "kinds": dict(Counter(c.kind for c in good)),
        "turns": _spread([sum(m.role == "assistant" for m in c.messages) for c in good]),
        "prompt_characters": _spread([len(c.prompt_text) for c in good]),
        "answer_characters": _spread([len(c.reference) for c in good]),
        "repeated": len(good) - len({(c.kind, c.messages) for c in good}),
    }
    return problems, summary


def _place(where: str) -> tuple[str, int]:
    file, _, line = where.rpartition(":")
    return file, int(line)


def _spread(numbers: list[int]) -> list[float]:
    return [min(numbers), median(numbers), max(numbers)] if numbers else []


def show(renderer: Renderer, conversations: Sequence[Conversation], n: int = 3, colour: bool = True,
         max_length: int = 4096) -> str:
    """The first n conversations as the model sees them, trained tokens marked.

    In colour, trained tokens alternate between two backgrounds and the rest is dim; without, trained runs stand between
    ⟦ and ⟧ with | between tokens, for a file or a pipe.
    """
    examples, _ = renderer.examples(conversations[:n], max_length)
    out = []
    for e in examples:
        trained = sum(e.trained)
        out.append(f"{e.where}  {len(e.ids)} tokens, {trained} trained")
        out.append(_coloured(renderer, e) if colour else _marked(renderer, e))
    stops = ", ".join(f"{renderer.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in renderer.stop_ids)
    return "\n".join([*out, f"answers end at: {stops}"])


def pieces(renderer: Renderer, example: Example) -> list[tuple[str, bool]]:
    """(text, trained) of each token; tokens that are parts of one character are put together."""
    def decode(ids: list[int]) -> str:
        return renderer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    out: list[tuple[str, bool]] = []
    context, held = [], []      # ids of the piece before, which a leading space depends on, and of this one
    for n, (token, trained) in enumerate(zip(example.ids, example.trained, strict=True)):
        held.append(token)
        before, text = decode(context), decode(context + held)
        if text.endswith("\ufffd") and len(held) < 4 and n + 1 < len(example.ids):
            continue
        out.append((text[len(before):] if text.startswith(before) else decode(held), trained))
        context, held = held, []
    return out


def _visible(text: str) -> str:
    """White space that can be seen, control characters that do nothing."""
    text = text.replace("\n", "⏎\n").replace("\t", "→")
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _coloured(renderer: Renderer, example: Example) -> str:
    colours = cycle(COLOURS)
    return "".join(f"{next(colours) if t else DIM}{_visible(text)}{RESET}" for text, t in pieces(renderer, example))


def _marked(renderer: Renderer, example: Example) -> str:
    out, inside = [], False
    for text, trained in pieces(renderer, example):
        out.append(("|" if inside else "⟦") if trained else ("⟧" if inside else ""))
        out.append(_visible(text))
        inside = trained
    return "".join(out) + ("⟧" if inside else "")

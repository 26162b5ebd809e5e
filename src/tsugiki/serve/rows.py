"""One request on its way: from waiting through its prompt to its last token."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsugiki.serve import sampling
from tsugiki.serve.arena import KV
from tsugiki.serve.request import Event, Stream, TokenLogprob
from tsugiki.serve.slots import Version
from tsugiki.serve.text import Writer, decode


class Row:
    """Its state is the engine's thread's; others see the stream."""

    def __init__(self, stream: Stream, version: Version | None, stop_ids: Sequence[int], longest: int):
        self.stream, self.version, self.stop_ids = stream, version, frozenset(stop_ids)
        self.sampling = stream.request.sampling
        self.prompt, self.answer = stream.request.ids, []
        self.longest = longest                        # tokens of the answer at most: what was asked, or what the base can
        self.passed = 0                               # how often others went first (waiting.py)
        self.done = 0                                 # prompt tokens whose keys and values are there
        self.kv: KV | None = None                     # of its virtual tokens and `done` ones, until it joins the others
        self.writer: Writer | None = None

    @property
    def key(self) -> str | None:
        return None if self.version is None else self.version.key

    @property
    def content(self) -> str:
        return "" if self.version is None else self.version.content

    @property
    def virtual(self) -> int:
        return 0 if self.version is None else self.version.virtual

    @property
    def placed(self) -> bool:
        return self.version is not None and self.version.placed

    @property
    def columns(self) -> int:
        """What it takes in the cache at its longest."""
        return self.virtual + len(self.prompt) + self.longest

    def draw(self) -> sampling.Draw:
        return sampling.Draw(self.sampling, self.stream.seed, len(self.answer), (*self.prompt, *self.answer)
                             if self.sampling.repetition_penalty != 1.0 else ())

    def push(self, token: int, scores: Any, tokenizer: Any) -> str | None:
        """One more token, told to the stream; how the request ends with it, if it does. scores: (V,), the model's own."""
        self.answer.append(token)
        found = () if self.sampling.logprobs is None else (_logprob(token, scores, self.sampling.logprobs, tokenizer),)
        ends = token in self.stop_ids and not self.sampling.ignore_stop_ids
        text, stopped = ("", False) if ends else self.writer.push(token)
        finish = "stop" if ends or stopped else "length" if len(self.answer) >= self.longest else None
        if finish is not None and not stopped:
            rest, stopped = self.writer.close()
            text, finish = text + rest, "stop" if stopped else finish
        self.stream.put(Event(text, (token,), found, finish))
        return finish

    def end(self, finish: str, error: str | None = None) -> None:
        """The last event, for an end that no token brought."""
        try:
            text = "" if self.writer is None else self.writer.close()[0]
        except Exception:                             # that it cannot be made is why the row ends
            text = ""
        self.stream.put(Event(text, (), (), finish, error))


def _logprob(token: int, scores: Any, count: int, tokenizer: Any) -> TokenLogprob:
    own, best = sampling.logprobs(scores, token, count)
    text = decode(tokenizer, [token])
    return TokenLogprob(token, text, tuple(text.encode()), own, tuple((i, decode(tokenizer, [i]), p) for i, p in best))

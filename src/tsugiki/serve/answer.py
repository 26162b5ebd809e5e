"""The engine's events as OpenAI's bodies: whole answers, and the chunks of a stream."""
from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from tsugiki.serve.refusal import Refusal

if TYPE_CHECKING:
    from tsugiki.serve.asked import Asked
    from tsugiki.serve.request import Event, TokenLogprob

VERSION = metadata.version("tsugiki")
LOWEST = -9999.0                    # JSON has no minus infinity; OpenAI writes this


@dataclass
class Choice:
    """One answer as it grows."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def add(self, event: Event) -> None:
        """Raises Refusal where the engine could not go on."""
        if event.finish == "error":
            raise Refusal(500, event.error or "the model failed on this request", code="model_failed")
        if event.finish == "cancelled":
            raise Refusal(503, "the server is stopping, or the adapter was taken off", code="cancelled")
        self.text += event.text
        self.tokens += len(event.ids)
        self.logprobs += event.logprobs
        self.finish = event.finish


class Answer:
    """The bodies of one request. `chat`: in the form of /v1/chat/completions, else of /v1/completions."""

    def __init__(self, asked: Asked, chat: bool):
        self.asked, self.chat = asked, chat
        self.choices = [Choice() for _ in asked.requests]
        self.each = len(asked.requests) // asked.prompts          # choices of a prompt
        what = "chat.completion" if chat else "text_completion"
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", "object": what,
                      "created": int(time.time()), "model": asked.model, "system_fingerprint": fingerprint(asked.version)}

    def usage(self, cached: int) -> dict:
        """cached: prompt tokens that the engine had from before. A prompt counts once, however many choices it has."""
        prompt = sum(len(r.ids) for r in self.asked.requests[::self.each])
        new = sum(c.tokens for c in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": min(cached, prompt)}}

    def whole(self, cached: int) -> dict:
        choices = []
        for index, c in enumerate(self.choices):
            body = {"message": {"role": "assistant", "content": c.text, "refusal": None}} if self.chat else {"text": c.text}
            choices.append({"index": index, **body, "logprobs": self._logprobs(c.logprobs, 0), "finish_reason": c.finish})
        return self._head | {"choices": choices, "usage": self.usage(cached)}

    # A stream: of chat a first chunk with the role, then text, then the reason it ended.

    def first(self, index: int) -> list[dict]:
        return [self._chunk(index, {"delta": {"role": "assistant", "content": "", "refusal": None}})] if self.chat else []

    def chunks(self, index: int, event: Event) -> list[dict]:
        """Adds the event to its choice. Raises Refusal where the engine could not go on."""
        choice = self.choices[index]
        start = len(choice.text)
        choice.add(event)
        found = []
        if event.text or event.logprobs:
            body = {"delta": {"content": event.text}} if self.chat else {"text": event.text}
            found.append(self._chunk(index, body, self._logprobs(event.logprobs, start)))
        if event.finish is not None:
            found.append(self._chunk(index, {"delta": {}} if self.chat else {"text": ""}, finish=event.finish))
        return found

    def last(self, cached: int) -> dict:
        """The chunk of include_usage."""
        return self._frame([]) | {"usage": self.usage(cached)}

    def _chunk(self, index: int, body: dict, logprobs: dict | None = None, finish: str | None = None) -> dict:
        return self._frame([{"index": index, **body, "logprobs": logprobs, "finish_reason": finish}])

    def _frame(self, choices: list[dict]) -> dict:
        head = self._head | ({"object": "chat.completion.chunk"} if self.chat else {})
        return head | {"choices": choices} | ({"usage": None} if self.asked.usage else {})

    def _logprobs(self, tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any] | None:
        """start: characters of the answer before these tokens."""
        if not self.asked.logprobs:
            return None
        if self.chat:
            return {"content": [_entry(t.text, t.logprob, t.bytes) | {"top_logprobs": [_entry(x, p) for _, x, p in t.top]}
                                for t in tokens], "refusal": None}
        offsets = []
        for t in tokens:
            offsets.append(start)
            start += len(t.text)
        return {"tokens": [t.text for t in tokens], "token_logprobs": [max(t.logprob, LOWEST) for t in tokens],
                "top_logprobs": [{x: max(p, LOWEST) for _, x, p in t.top} for t in tokens], "text_offset": offsets}


def _entry(text: str, logprob: float, data: Sequence[int] | None = None) -> dict:
    """One token of a chat's logprobs. Of a token that is a part of a character its text does not give the bytes."""
    known = data if data is not None else None if "\ufffd" in text else text.encode()
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": None if known is None else list(known)}


def fingerprint(version: str) -> str:
    """What answered: this software and the adapter's content."""
    return f"fp_{hashlib.sha256(f'{VERSION} {version}'.encode()).hexdigest()[:10]}"

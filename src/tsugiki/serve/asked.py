"""A checked body to requests of the engine: which adapter, which token ids, how to sample."""
from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tsugiki.data import Conversation, Message, Renderer
from tsugiki.errors import UserError, nearest
from tsugiki.serve import schema
from tsugiki.serve.refusal import Refusal
from tsugiki.serve.request import Request, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tsugiki.serve.engine import AdapterInfo, Engine

COMPLETION_TOKENS = 16              # OpenAI's default of /v1/completions
ROLES = {"developer": "system"}


@dataclass(frozen=True)
class Asked:
    """One HTTP request: what goes to the engine, one request a choice (prompt by prompt), and how it is answered."""

    model: str
    version: str                    # of the adapter's content
    requests: tuple[Request, ...]
    prompts: int
    stream: bool
    usage: bool                     # a last chunk with the usage
    logprobs: bool


class Models:
    """The names that a request may call: the base's, and every adapter's. Methods are called from several threads."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, base: str, vocabulary: int):
        self.engine, self.tokenizer, self.base, self.vocabulary = engine, tokenizer, base, vocabulary
        self._lock = threading.Lock()                 # a fast tokenizer serves one thread at a time
        self._renderer = lru_cache(64)(lambda template, stop: Renderer(tokenizer, template=template, stop=stop))

    def find(self, name: str) -> AdapterInfo | None:
        """What is known of a model; None for the base. Raises Refusal (404)."""
        if name == self.base:
            return None
        try:
            return self.engine.info(name)
        except UserError:
            near = nearest(name, [self.base, *(a.name for a in self.engine.adapters())])
            raise Refusal(404, f"model: there is no {name[:100]!r}{near}", param="model", code="model_not_found") from None

    def kind(self, info: AdapterInfo | None) -> str:
        """"chat" or "plain": as the adapter was trained, or as the base's tokenizer has a template or not."""
        if info is not None:
            return info.kind
        return "chat" if self.tokenizer.chat_template else "plain"

    def ids(self, info: AdapterInfo | None, conversations: Sequence[Conversation]) -> list[tuple[int, ...]]:
        """The prompts' ids, as training saw them. Raises Refusal."""
        template, stop = (info.template, info.stop) if info is not None else (None, None)
        try:
            with self._lock:
                found = self._renderer(template, stop).prompts(conversations)
        except UserError as e:
            raise Refusal(400, str(e).splitlines()[0], param=conversations[0].where) from None
        return [tuple(ids) for ids in found]

    def chat(self, body: dict, limits: schema.Limits) -> Asked:
        """Raises Refusal."""
        schema.check(body, schema.chat(limits))
        info = self.find(body["model"])
        messages = [Message(ROLES.get(m["role"], m["role"]), _text(m["content"])) for m in body["messages"]]
        if messages[-1].role == "assistant":
            raise Refusal(400, "messages: the last one is an assistant's; an answer is never begun for the model", "messages")
        asked = body.get("kind") or "auto"
        kind = self.kind(info) if asked == "auto" else asked
        if kind == "plain" and (len(messages) > 1 or messages[0].role != "user"):
            why = "was trained on" if info is not None else "has no chat template and takes"
            raise Refusal(400, f"messages: {body['model']!r} {why} plain prompts: give one user message, or kind 'chat'",
                          "messages")
        answer = Message("assistant", "")
        prompt = self.ids(info, [Conversation(kind, (*messages, answer), "messages")])
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise Refusal(400, "top_logprobs: goes with logprobs true", "top_logprobs")
        if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
            raise Refusal(400, "max_tokens: is given twice, also as max_completion_tokens", "max_tokens")
        most = body.get("max_completion_tokens") or body.get("max_tokens") or limits.max_tokens
        logprobs = (body.get("top_logprobs") or 0) if body.get("logprobs") else None
        return self._asked(body, info, prompt, int(most), logprobs)

    def completion(self, body: dict, limits: schema.Limits) -> Asked:
        """Raises Refusal."""
        schema.check(body, schema.completion(limits))
        info, prompt = self.find(body["model"]), body["prompt"]
        given = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int | float) else [prompt]
        if isinstance(given[0], str):
            prompts = self.ids(info, [Conversation("plain", (Message("user", text), Message("assistant", "")), "prompt")
                                      for text in given])
        else:
            prompts = [tuple(map(int, ids)) for ids in given]
            if (largest := max(map(max, prompts))) >= self.vocabulary:
                raise Refusal(400, f"prompt: {largest} is no token; the model has {self.vocabulary}", "prompt")
        most = body.get("max_tokens") or min(COMPLETION_TOKENS, limits.max_tokens)
        logprobs = body.get("logprobs")
        return self._asked(body, info, prompts, int(most), None if logprobs is None else int(logprobs))

    def _asked(self, body: dict, info: AdapterInfo | None, prompts: list[tuple[int, ...]], most: int,
               logprobs: int | None) -> Asked:
        n, stop, seed, options = int(body.get("n") or 1), body.get("stop") or (), body.get("seed"), body.get("stream_options")
        if any(not ids for ids in prompts):
            raise Refusal(400, "prompt: is empty, and the tokenizer adds no beginning: there is nothing to continue", "prompt")
        if options and not body.get("stream"):
            raise Refusal(400, "stream_options: goes with stream true", "stream_options")

        def sampling(choice: int) -> Sampling:
            return Sampling(max_tokens=most, temperature=float(_given(body, "temperature", 1.0)),
                            top_p=float(_given(body, "top_p", 1.0)), top_k=int(_given(body, "top_k", 0)),
                            repetition_penalty=float(_given(body, "repetition_penalty", 1.0)), logprobs=logprobs,
                            # the first choice is what the request gives alone; the others are other draws
                            seed=None if seed is None else (int(seed) + choice) % (1 << 63),
                            stop=(stop,) if isinstance(stop, str) else tuple(stop))
        name = None if info is None else info.name
        return Asked(body["model"], "" if info is None else info.version,
                     tuple(Request(ids, name, sampling(choice)) for ids in prompts for choice in range(n)), len(prompts),
                     bool(body.get("stream")), bool(options and options.get("include_usage")), logprobs is not None)


def _given(body: dict, name: str, default: float) -> float:
    value = body.get(name)
    return default if value is None else value


def _text(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)

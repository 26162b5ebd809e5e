"""An engine on a tiny base with adapters of many methods on disk, and what each request must be answered: generate() alone."""
from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kit import TOKENIZER
from tiny import METHOD_CASES, attached, fill, tiny
from torch import nn

from tsugiki import formats
from tsugiki.serve.engine import Engine, Request, Sampling, Stream

F64 = torch.float64
WHO = [name for name in ("lora", "dora", "prefix", "prompt", "llama_adapter", "series", "parallel", "ia3", "reft", "mam", "oft",
                         "vera") if name in METHOD_CASES]
VOCAB = len(TOKENIZER)


@dataclass
class Served:
    """A base, adapter folders by name, and answers of transformers' generate, one request at a time."""
    model: nn.Module
    folders: dict[str, Path]
    answers: dict[tuple, list[int]] = field(default_factory=dict)

    def engine(self, *names: str, started: bool = True, **options) -> Engine:
        engine = Engine(self.model, TOKENIZER, **{"slots": 4, "batch": 8, "chunk": 32} | options)
        for name in names or self.folders:
            engine.add(name, self.folders[name])
        if started:
            engine.start()
        return engine

    def alone(self, ids: tuple[int, ...], name: str | None, count: int, **options) -> list[int]:
        """Greedy tokens of generate() for one request. `name` is a folder's; nothing else is attached."""
        key = (ids, name, count, *options.items())
        if key not in self.answers:
            x, adapters = torch.tensor([ids]), self.model.adapters
            if name is not None:
                formats.load(adapters, "alone", self.folders[name])
            try:
                out = self.model.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=count, do_sample=False,
                                          pad_token_id=0, adapter_ids=["alone" if name is not None else None],
                                          **{"eos_token_id": None} | options)
            finally:
                if name is not None:
                    adapters.remove("alone")
            self.answers[key] = out[0, len(ids):].tolist()
        return self.answers[key]


def serve(folder: Path, kind: str = "llama", dtype: torch.dtype = F64, names=WHO, scale: float = 0.3, **overrides) -> Served:
    model = tiny(kind, dtype, **{"vocab_size": VOCAB} | overrides)
    adapters, folders = attached(model, *names, scale=scale), {}
    for name in names:
        folders[name] = formats.save(adapters.get(name), folder / name)
        adapters.remove(name)
    return Served(model, folders)


def another(served: Served, name: str, seed: int, folder: Path) -> str:
    """One more adapter of the same method, with other numbers."""
    adapters = served.model.adapters
    adapter = formats.load(adapters, "other", served.folders[name])
    served.folders[folder.name] = formats.save(fill(adapter, seed=seed, scale=0.3), folder)
    adapters.remove("other")
    return folder.name


def greedy(count: int, **options) -> Sampling:
    return Sampling(**{"max_tokens": count, "temperature": 0.0, "ignore_stop_ids": True} | options)


def draw_requests(served: Served, count: int, seed: int, longest: int = 60, names=None) -> list[tuple]:
    """(ids, adapter's name or None, tokens): some prompts begin alike."""
    draw = random.Random(seed)
    common = [[draw.randrange(5, VOCAB) for _ in range(longest)] for _ in range(2)]
    found = []
    for _ in range(count):
        ids = [draw.randrange(5, VOCAB) for _ in range(draw.randrange(1, longest))]
        if draw.random() < 0.5:
            ids = draw.choice(common)[:draw.randrange(longest // 2, longest)] + ids[:8]
        found.append((tuple(ids), draw.choice([*(names or served.folders), None]), draw.randrange(1, 24)))
    return found


def submit(engine: Engine, request: tuple, **options) -> Stream:
    ids, name, count = request
    return engine.submit(Request(ids, name, greedy(count, **options)))

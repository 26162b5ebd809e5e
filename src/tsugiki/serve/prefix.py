"""Keys and values of prompts seen before, in blocks of tokens: what equal beginnings under the same adapter need not compute."""
from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tsugiki.serve.arena import KV

BLOCK = 32                                            # tokens


@dataclass(frozen=True)
class Block:
    """The first one of a prompt holds the adapter's virtual tokens, too."""
    kv: KV
    size: int                                         # columns


class PrefixCache:
    """Blocks by what determines them: the adapter's content, and every token up to their end. Least recently used go first.

    For adapters whose keys and values depend on nothing else; what edits by the distance to a prompt's end does.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0              # in columns
        self.blocks: OrderedDict[bytes, Block] = OrderedDict()

    @staticmethod
    def root(content: str) -> bytes:
        """Where the keys of an adapter's blocks begin. content: the hash of all that it is; "" for the base."""
        return hashlib.blake2b(content.encode(), digest_size=16).digest()

    def keys(self, content: str, ids: Sequence[int]) -> list[bytes]:
        """One a whole block of ids; each holds all before it."""
        key, found = self.root(content), []
        for end in range(BLOCK, len(ids) + 1, BLOCK):
            key = hashlib.blake2b(key + array("q", ids[end - BLOCK:end]).tobytes(), digest_size=16).digest()
            found.append(key)
        return found

    def take(self, content: str, ids: Sequence[int]) -> tuple[int, KV | None]:
        """(tokens, keys and values) of the longest known beginning; one token at least is left to compute."""
        if not self.blocks:
            return 0, None
        keys = self.keys(content, ids[:len(ids) - 1])
        known = next((n for n, key in enumerate(keys) if key not in self.blocks), len(keys))
        if not known:
            return 0, None
        for key in reversed(keys[:known]):            # a beginning outlives what follows it
            self.blocks.move_to_end(key)
        layers = zip(*(self.blocks[key].kv for key in keys[:known]), strict=True)
        return known * BLOCK, [tuple(torch.cat(parts, -2) for parts in zip(*layer, strict=True)) for layer in layers]

    def keep(self, content: str, ids: Sequence[int], kv: KV) -> None:
        """Remember a prompt's whole blocks. kv: all of its columns, virtual tokens before ids."""
        virtual = kv[0][0].shape[-2] - len(ids)
        for n, key in enumerate(self.keys(content, ids)):
            start, end = virtual + n * BLOCK if n else 0, virtual + (n + 1) * BLOCK
            if key in self.blocks or end > self.limit:
                continue
            self.blocks[key] = Block([tuple(t[:, start:end].clone() for t in layer) for layer in kv], end - start)
            self.used += end - start
        while self.used > self.limit:
            self.used -= self.blocks.popitem(last=False)[1].size

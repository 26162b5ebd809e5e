"""JSON as the standard has it: a decoder that also reports what Python's own lets pass."""
from __future__ import annotations

import json
import math
import re

MAX_LINE = 64 * 2**20     # bytes of a line or a row; longer is a file that lost its line ends
_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")    # what could be half a surrogate pair, or NUL


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "true/false", int: "a number", float: "a number", str: "text",
             list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


class Broken(Exception):
    """JSON that cannot be read on; args: reason, position."""


class Strict:
    """A JSON decoder that also notes what Python's lets pass: duplicate keys, NaN, infinities, half surrogate pairs."""

    def __init__(self):
        self.defects: list[tuple[str, str]] = []
        hooks = {"object_pairs_hook": self._pairs, "parse_constant": self._constant, "parse_float": self._float}
        self.scan = json.JSONDecoder(**hooks).raw_decode

    def _pairs(self, pairs: list[tuple[str, object]]) -> dict:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [k for k, _ in pairs]
            twice = next(k for k in names if names.count(k) > 1)
            self.defects.append((twice, "key appears twice"))
        return fields

    def _constant(self, name: str) -> None:
        self.defects.append(("row", f"{name} is not a JSON number"))

    def _float(self, digits: str) -> float:
        if math.isinf(value := float(digits)):
            self.defects.append(("row", f"number {digits[:20]} is too large"))
        return value

    def decode(self, text: str, start: int) -> tuple[object, int]:
        """The value at `start` and where it ends; what is wrong with it is in `defects`. Raises Broken."""
        self.defects = []
        try:
            value, end = self.scan(text, start)
        except json.JSONDecodeError as e:
            raise Broken(f"not valid JSON: {e.msg} at column {e.pos - text.rfind(chr(10), 0, e.pos)}", e.pos) from None
        except RecursionError:
            raise Broken("nested too deeply", start) from None
        except ValueError as e:                                     # an integer of thousands of digits
            raise Broken(f"not valid JSON: {str(e)[:120]}", start) from None
        if end - start > MAX_LINE:
            self.defects.append(("row", f"longer than {MAX_LINE >> 20} MB"))
        if _ESCAPE.search(text, start, end):
            self._characters(value, "row")
        return value, end

    def _characters(self, value: object, path: str) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                self._characters(k, path)
                self._characters(v, k if path == "row" else f"{path}.{k}")
        elif isinstance(value, list):
            for n, v in enumerate(value):
                self._characters(v, f"{path}[{n}]")
        elif isinstance(value, str):
            if "\0" in value:
                self.defects.append((path, "holds a NUL character (\\u0000)"))
            if any("\ud800" <= c <= "\udfff" for c in value):
                name = path.encode(errors="replace").decode()
                self.defects.append((name, "holds half of a surrogate pair (\\ud8xx alone)"))

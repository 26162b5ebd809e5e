"""Whether a run's layers are compiled, decided from its length alone, so that it decides the same when it is resumed."""
from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from tsugiki.kernels.passes import has_single, take_back

# Compiling takes about a minute and makes a step some tenth quicker, so it pays from about a quarter of an hour on: this many
# operations, at what a good machine of the kind does in a second. Estimates from two CPUs; no GPU was at hand.
WORTH = {"cpu": 15 * 60 * 1e12, "cuda": 15 * 60 * 3e14}
MINUTE = "about a minute at the first steps"


class Layers:
    """A model's decoder layers, compiled or not. One compilation serves all of them."""

    def __init__(self, layers: Sequence[nn.Module], on: bool):
        self.layers, self.on = layers, on
        self.taken = take_back(layers) if on else []
        if on:
            for layer in layers:
                layer.compile()

    def undo(self) -> None:
        """Back to eager, as if it had never been."""
        self.on = False
        for layer in self.layers:
            layer._compiled_call_impl = None
        for module, stands_in in self.taken:
            module.forward = stands_in


@contextmanager
def compiling(layers: Sequence[nn.Module], wish: str, work: float, device: torch.device,
              say: Callable[[str], None]) -> Iterator[Layers]:
    """The layers, compiled inside if `wish` is "on", or "auto" and `work` (floating-point operations of the run) is worth it."""
    worth, on = WORTH.get(device.type, float("inf")), wish == "on"
    if device.type == "cpu" and has_single(layers):                           # no quicker than these, when measured
        worth = float("inf")
    if wish == "auto" and work >= worth and not any(getattr(layer, "_compiled_call_impl", None) for layer in layers):
        if (missing := _missing(device)) is None:
            on = True
            say(f"compiling the layers ({MINUTE}): the run is long enough to win it back (train.compile)")
        else:
            say(f"not compiling the layers, which would pay in a run this long: {missing}")
    made = Layers(layers, on)
    try:
        yield made
    finally:
        if made.on:
            made.undo()


def _missing(device: torch.device) -> str | None:
    """What torch.compile would need and is not here."""
    if platform.system() == "Windows" and device.type == "cpu":
        return "torch.compile on a CPU needs a C++ compiler in the path here; train.compile=on tries it"
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return "there is no C++ compiler (g++)"
    return None

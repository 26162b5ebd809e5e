"""Adapters folded into the base's weights and taken out again: the only code that changes a frozen weight."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .tap import base_parameters
from .weights import check_writable, dense, few_bits, quantisable, restore, write


@dataclass(frozen=True)
class MergeReport:
    """How exact a merge is. Without rounding both errors are 0."""
    name: str
    modules: int                                      # modules whose weights changed
    max_error: float                                  # largest rounding error of one number
    relative_error: float                             # ||merged - exact|| / ||adapter's change||, Frobenius, over all modules
    undeclared: tuple[str, ...]                       # biases the model's config cannot declare: a saved folder loses them


@dataclass(frozen=True)
class Kept:
    """What a module had before anything was merged into it."""
    weight: Tensor
    bias: Tensor | None
    tied: nn.Parameter | None                         # the embedding's own parameter, where the head shared it


class Merged:
    """Originals of every touched module, and the adapters merged now, in order."""

    def __init__(self, home: Any):
        self.home = home
        self.order: list[str] = []
        self._kept: dict[nn.Module, Kept] = {}
        self._flags: dict[str, Any] = {}              # config fields changed for the sake of a merge
        self._few, self._quantisable = few_bits(home.model), quantisable(home.model)     # now: later, threads may add adapters
        self._prints: tuple[str | None, str] | None = None

    def merge(self, adapter: Any) -> MergeReport:
        if adapter.name in self.order:
            raise UserError(f"adapter {adapter.name!r} is merged already")
        if not adapter.mergeable:
            raise UserError(f"{adapter.cfg.name} is not a change of weights: adapter {adapter.name!r} cannot be merged")
        for module in self._modules(adapter):
            check_writable(module)
        self._prints = self.fingerprints()
        self.order.append(adapter.name)
        try:
            errors = [self._recompute(module) for module in self._modules(adapter)]
            undeclared = self._declare_biases()
        except BaseException:
            self.unmerge(adapter)
            raise
        error, change = (math.sqrt(sum(e[i] for e in errors)) for i in (0, 1))
        return MergeReport(adapter.name, len(errors), max(e[2] for e in errors), error / change if change else 0.0, undeclared)

    def unmerge(self, adapter: Any) -> None:
        if adapter.name not in self.order:
            raise UserError(f"adapter {adapter.name!r} is not merged")
        self.order.remove(adapter.name)
        for module in self._modules(adapter):
            if module in self._kept:
                self._recompute(module)
        self._declare_biases()
        if not self.order:
            self._prints = None

    def originals(self) -> list[tuple[nn.Module, Tensor]]:
        """Every module a merge changed, with its weight from before, in the module's own layout."""
        return [(module, kept.weight) for module, kept in self._kept.items()]

    @staticmethod
    def _modules(adapter: Any) -> list[nn.Module]:
        return list(dict.fromkeys(site.exit for site, _ in adapter.edits.values()))

    @torch.no_grad()
    def _recompute(self, module: nn.Module) -> tuple[float, float, float]:
        """The module's weight from its original and every merged adapter: (error^2, change^2, largest error)."""
        edits = [pair for name in self.order for pair in self.home.get(name).edits.values() if pair[0].exit is module]
        if not edits:
            self._restore(module)
            return 0.0, 0.0, 0.0
        kept = self._keep(module)
        w0, b0 = dense(module, kept.weight).double(), None if kept.bias is None else kept.bias.double()
        w, b = fold(edits, w0, b0)
        write(module, w, b)
        pairs = [(dense(module).double(), w, w0)]
        if b is not None:
            pairs.append((module.bias.double(), b, torch.zeros_like(b) if b0 is None else b0))
        return (sum(float((now - exact).square().sum()) for now, exact, _ in pairs),
                sum(float((exact - before).square().sum()) for _, exact, before in pairs),
                max(float((now - exact).abs().max()) for now, exact, _ in pairs))

    def _keep(self, module: nn.Module) -> Kept:
        if module not in self._kept:
            weight, bias = module.weight, getattr(module, "bias", None)
            tied = any(other is not module and getattr(other, "weight", None) is weight
                       for other in self.home.model.modules())
            if tied:                                  # a change of the head must not reach the embedding
                module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
                self._set_flag("tie_word_embeddings", False)
            module.kept = self._kept[module] = Kept(weight.detach().clone(), None if bias is None else bias.detach().clone(),
                                                    weight if tied else None)
        return self._kept[module]

    def _forget(self, module: nn.Module) -> Kept:
        del module.kept
        return self._kept.pop(module)

    def _restore(self, module: nn.Module) -> None:
        kept = self._forget(module)
        if kept.tied is not None:
            restore(module, kept.weight, kept.bias)
            module.weight = kept.tied
            self._reset_flag("tie_word_embeddings")
        else:
            restore(module, kept.weight, kept.bias)

    def _set_flag(self, name: str, value: Any) -> None:
        self._flags.setdefault(name, getattr(self.home.model.config, name))
        setattr(self.home.model.config, name, value)

    def _reset_flag(self, name: str) -> None:
        if name in self._flags:
            setattr(self.home.model.config, name, self._flags.pop(name))

    def _declare_biases(self) -> tuple[str, ...]:
        """Make the config say which linears have a bias: every linear under a flag gets one, zero where nothing was added."""
        linears = [s for s in self.home.sites if s.layer >= 0 and not s.span and s.features is None and s.name == s.module]
        declared, flags = set(), self.home.family.bias_flags
        added = {s.module for s in linears if (k := self._kept.get(s.exit)) and k.bias is None and s.exit.bias is not None}
        real = {s.module for s in linears if s.module in added and self._changes_bias(s.exit)}
        for flag, roles in flags.items():
            covered = [s for s in linears if s.role in roles]
            needed = any(s.module in real for s in covered)
            if needed:
                self._set_flag(flag, True)
            for s in covered:
                if needed and s.exit.bias is None:
                    self._keep(s.exit)
                    s.exit.bias = nn.Parameter(s.exit.weight.new_zeros(s.d_out), requires_grad=False)
                elif not needed and s.module in added:
                    s.exit.bias = None
                    if not self._touched(s.exit):
                        self._forget(s.exit)
            if not needed:
                self._reset_flag(flag)
            declared |= {s.module for s in covered}
        heads = [s.module for s in self.home.sites if s.role == "head" and (k := self._kept.get(s.exit))
                 and k.bias is None and getattr(s.exit, "bias", None) is not None]
        return tuple(sorted(real - declared) + heads)

    def _touched(self, module: nn.Module) -> bool:
        return any(s.exit is module for name in self.order for s, _ in self.home.get(name).edits.values())

    def _changes_bias(self, module: nn.Module) -> bool:
        return self._touched(module) and bool(module.bias.detach().abs().max() > 0)

    def fingerprints(self) -> tuple[str | None, str]:
        """(of everything, or None for a base in few bits; of what few bits leave alone): sha256 over (name, shape, 64 strided
        values rounded to bf16) of the base's parameters, tied ones once. The second has no weights of linears."""
        if self._prints is not None:                  # something is merged: as it was before
            return self._prints
        everything, rest = hashlib.sha256(), hashlib.sha256()
        for name, p in base_parameters(self.home.model):
            flat = p.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).view(torch.int16).cpu().tolist()
            line = repr((name, tuple(p.shape), sample)).encode()
            everything.update(line)
            if name not in self._quantisable:
                rest.update(line)
        return None if self._few else everything.hexdigest(), rest.hexdigest()


def fold(edits: Sequence[tuple[Any, Any]], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(site, edit) pairs of one module, in their order, into its whole weight (out, in) and bias, as new tensors."""
    for site, edit in edits:
        w, b = _fold(edit, site, w, b)
    for site, edit in reversed(edits):                # outputs change after the weight, inputs before it: the last one meets it
        w = edit.merge_input(w, site)
    return w, b


def _fold(edit: Any, site: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One edit into a whole weight; a part of a fused weight is folded in place of its rows."""
    if site.features is None:
        return edit.merge(w, b, site)
    rows = site.features.to(w.device)
    part, bias = edit.merge(w[rows], None if b is None else b[rows], site)
    w = w.index_copy(0, rows, part)
    if bias is not None:
        b = (w.new_zeros(len(w)) if b is None else b).index_copy(0, rows, bias)
    return w, b

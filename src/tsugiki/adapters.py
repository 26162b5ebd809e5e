"""All adapters on one base model: add, remove, use, merge, save, load."""
from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .edit import Config, Edit, Start, changes_input, kept_buffers, mergeable
from .errors import UserError, nearest
from .merge import Merged, MergeReport
from .route import prompting, using
from .sites import Family, Site, family_of, select, sites
from .tap import Unsaved, child, install
from .virtual import enter, enter_part, leave
from .weights import device_of, keep_exact


@dataclass(frozen=True, eq=False)
class Adapter:
    """A named set of edits on a frozen base."""
    name: str
    cfg: Config
    edits: dict[str, tuple[Site, Edit]]               # by site name, in site order
    shared: nn.ModuleDict
    home: Adapters

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for site, _ in self.edits.values())

    @property
    def virtual(self) -> int:
        """Virtual tokens it adds to a row."""
        return next((part.tokens for part in self.cfg.parts if part.edit.virtual), 0)

    @property
    def needs_places(self) -> bool:
        """Whether it must know where prompts end (Context.places)."""
        return any(edit.needs_places for _, edit in self.edits.values())

    @property
    def mergeable(self) -> bool:
        return all(mergeable(edit) for _, edit in self.edits.values())

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from ((f"{site}.", edit) for site, (_, edit) in self.edits.items())
        yield "shared.", self.shared

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its trained tensors, keyed by site name + "." + parameter name, in site order; then what its edits share."""
        return {prefix + key: p for prefix, module in self._modules() for key, p in module.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """What it keeps beside them and is not trained: fixed projections, starts, what a schedule remembers."""
        return {prefix + key: t for prefix, module in self._modules() for key, t in kept_buffers(module)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that makes it what it is: parameters, then buffers."""
        return {key: p.detach() for key, p in self.parameters().items()} | self.buffers()


class Shared(Unsaved):
    """What the edits of one adapter share, one ModuleDict an adapter; a child of the model."""


class _Generate:
    """`model.generate(..., adapter_ids=...)`: transformers checks keyword arguments before any hook could take it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, adapter_ids: Any = None, **kwargs: Any) -> Any:
        inputs = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
        given = next((x for x in inputs if x is not None), None)
        choice = self.model.adapters.use(adapter_ids) if adapter_ids is not None else nullcontext()
        with choice, prompting(given.shape[1] if isinstance(given, Tensor) else None):
            return type(self.model).generate(self.model, *args, **kwargs)


class Adapters:
    """Every adapter attached to one base model. Made by `attach`."""

    def __init__(self, model: nn.Module, family: Family | None = None):
        self.family = family or family_of(model)
        self.sites = tuple(sites(model, self.family))             # raises before anything is changed
        keep_exact(model)                                         # raises, too
        self.model = model
        self.arguments = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.checkpointed = tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        self.virtual: dict[str, tuple[int, str]] = {}             # adapter -> (virtual tokens, their kind of position)
        self.placed: set[str] = set()                             # adapters that read Context.places
        self._adapters: dict[str, Adapter] = {}
        self._active: tuple[str, ...] = ()
        self._merged = Merged(self)
        model.requires_grad_(False)
        self._taps = {site.name: install(site, self) for site in self.sites}
        self.embed_tap = next(self._taps[site.name] for site in self.sites if site.role == "embed")
        model.add_module("adapter_shared", Shared())
        model.adapters = self
        model.register_forward_pre_hook(enter, with_kwargs=True)
        model.register_forward_hook(leave, with_kwargs=True, always_call=True)
        part = getattr(model, "base_model", model)
        if part is not model:
            part.adapters_of = [model]                            # in a list: known, not owned
            part.register_forward_pre_hook(enter_part, with_kwargs=True)
            part.register_forward_hook(leave, with_kwargs=True, always_call=True)
        if hasattr(type(model), "generate"):
            model.generate = _Generate(model)

    def names(self) -> tuple[str, ...]:
        """In the order they were added."""
        return tuple(self._adapters)

    @property
    def merged(self) -> tuple[str, ...]:
        return tuple(self._merged.order)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters of a row when a call names none: the first one added, unless set."""
        return self._active

    @active.setter
    def active(self, names: str | Sequence[str] | None) -> None:
        names = (names,) if isinstance(names, str) else tuple(names or ())
        for name in names:
            self.get(name)
        self._active = names
        self._refresh()

    def _refresh(self) -> None:
        self.default = tuple(name for name in self._active if name not in self.merged)

    default: tuple[str, ...] = ()                                 # `active` without what is merged; read by every tap

    def get(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise UserError(f"no adapter {name!r} is attached{nearest(name, self._adapters)} "
                            f"(attached: {', '.join(self._adapters) or 'none'})")
        return self._adapters[name]

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """The trained tensors of these adapters, or of all."""
        return [p for name in names or self._adapters for p in self.get(name).parameters().values()]

    def add(self, name: str, config: Config, *, seed: int = 0, tokenizer: Any = None, room: int | None = None) -> Adapter:
        """Attach a new adapter; the first one becomes the default. Raises UserError for a bad name, config or target.

        tokenizer: only for methods that start from a text; room: the most numbers that it may make, all tensors together.
        """
        left = None if room is None else [room]
        self.check_name(name)
        if not isinstance(config, Config) or not config.parts:
            raise UserError(f"adapter {name!r}: {getattr(config, 'name', config)!r} is not a method that adds an adapter")
        chosen = [(part, sites) for part in config.parts if (sites := self._chosen(part, config))]
        if not chosen:
            raise UserError(f"{config.name}: none of its targets is a site that it edits")
        self.model.adapter_shared.add_module(child(name), shared := nn.ModuleDict())
        try:
            made = {}
            for part, sites in chosen:
                start = Start(seed, device_of(sites[0].exit), self._dtype(), shared, name, tuple(sites), self.sites, tokenizer,
                              left)
                for site in sites:
                    place = replace(start, device=device_of(site.exit))
                    made[site.name] = (site, part.edit(part, site, place).train(self.model.training))
        except Exception:
            delattr(self.model.adapter_shared, child(name))
            raise
        edits = {site.name: made[site.name] for site in self.sites if site.name in made}
        self._put(adapter := Adapter(name, config, edits, shared, self))
        if len(self._adapters) == 1:
            self.active = name
        return adapter

    def _put(self, adapter: Adapter) -> None:
        """Its edits on their taps, and what a forward looks up about it."""
        for site, edit in adapter.edits.values():
            self._taps[site.name].add(adapter.name, edit)
        for part in adapter.cfg.parts:
            if part.edit.virtual:
                self.virtual[adapter.name] = (part.tokens, part.edit.virtual)
        if adapter.needs_places:
            self.placed.add(adapter.name)
        self._adapters[adapter.name] = adapter

    def put_back(self, adapter: Adapter) -> None:
        """Attach what `remove` took off, as it was: nothing is built or read anew. It does not become the default."""
        self.check_name(adapter.name)
        self.model.adapter_shared.add_module(child(adapter.name), adapter.shared)
        self._put(adapter)

    def _chosen(self, part: Config, config: Config) -> Sequence[Site]:
        default = part.targets == type(part).targets
        sites = part.pick(select(self.sites, part.targets, part.edit.roles, config.name, default))
        shared = next((s for s in sites if s.features is not None or s.span), None)
        if shared is not None and changes_input(part.edit):
            raise UserError(f"{config.name} changes its site's input, which {shared.name} shares with others; target "
                            "whole linears (\"linear\")")
        return sites

    def _dtype(self) -> torch.dtype:
        """Of a new adapter's tensors."""
        return torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32

    def check_name(self, name: str) -> None:
        """Raises UserError unless a new adapter can be called so."""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
            raise UserError(f"adapter name {name!r}: up to 100 letters, digits, '_', '-' and '.', not starting with '-' or '.'")
        if name in self._adapters:
            raise UserError(f"adapter {name!r} exists; remove it first")

    def remove(self, name: str) -> Adapter:
        """Take an adapter off; `put_back` attaches it again. Raises UserError while it is merged."""
        adapter = self.get(name)
        if name in self.merged:
            raise UserError(f"adapter {name!r} is merged; unmerge({name!r}) first")
        for site, _ in adapter.edits.values():
            self._taps[site.name].remove(name)
        delattr(self.model.adapter_shared, child(name))
        self.virtual.pop(name, None)
        self.placed.discard(name)
        del self._adapters[name]
        if name in self._active:
            self.active = tuple(n for n in self._active if n != name)
        return adapter

    def use(self, ids: str | tuple[str, ...] | dict[str, float] | Sequence[Any] | None) -> AbstractContextManager:
        """Which adapters each row uses inside the block, in this thread: a name, a tuple of names (applied in that order) or
        names with the weights of their changes, for all rows; a list with one of these a row; or None."""
        return using(self, ids)

    def merge(self, name: str) -> MergeReport:
        """Fold an adapter into the base's weights: summed in float64 from the originals, rounded once."""
        report = self._merged.merge(self.get(name))
        self._refresh()
        return report

    def unmerge(self, name: str) -> None:
        """Take it out again; with none left the base has its exact original bits."""
        self._merged.unmerge(self.get(name))
        self._refresh()

    def originals(self) -> list[tuple[nn.Module, torch.Tensor]]:
        """Every module that merges changed, with its weight from before, in the module's own layout."""
        return self._merged.originals()

    def fingerprints(self) -> tuple[str | None, str]:
        """Name the base's weights, whatever is merged: all of them, in 16 bits or more whatever the precision (None for a base
        in few bits); and those that few bits leave as they are (embeddings, norms, biases), the same for every precision."""
        return self._merged.fingerprints()

    def fingerprint(self) -> str | None:
        """The first of `fingerprints`."""
        return self.fingerprints()[0]

    def save(self, name: str, path: str | Path, **options: Any) -> Path:
        from .formats import save  # formats know adapters, not the other way round
        return save(self.get(name), path, **options)

    def load(self, name: str, path: str | Path, **options: Any) -> Adapter:
        from .formats import load
        return load(self, name, path, **options)

    def combine(self, new: str, names: Mapping[str, float] | Sequence[str], **options: Any) -> Any:
        """Add a LoRA `new` made of several adapters' weighted changes: how=, rank=, density=, seed=, as tsugiki.combine says."""
        from .combine import combine  # makes a LoRA; the core knows no method
        return combine(self, new, names, **options)

    def convert(self, name: str, new: str, rank: int | None = None) -> Any:
        """Add a LoRA `new` with the change of weights that the adapter `name` makes, exact or the best one of a rank."""
        from .combine import convert
        return convert(self, name, new, rank)


def attach(model: nn.Module, family: Family | None = None) -> Adapters:
    """Prepare a transformers model for adapters: same object, class and state_dict keys; its weights are frozen.

    Attaching twice gives the same Adapters. Raises UserError for a model whose family is not known.
    """
    there = model.__dict__.get("adapters")
    return there if isinstance(there, Adapters) else Adapters(model, family)

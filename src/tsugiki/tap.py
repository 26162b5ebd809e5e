"""All edits at one site: the base runs once for the whole batch, then each adapter edits its own rows."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .edit import Edit
from .errors import UserError
from .group import Part, Stacks, run, together
from .kernels import low_rank
from .pool import Pools
from .route import UNSET, Context, Level, cell, cut, levels, wanted
from .sites import Site
from .weights import device_of


class Unsaved(nn.Module):
    """A module whose tensors move and train with the model but are no part of its state_dict: the base's keys stay."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_note_prefix)
        self.register_load_state_dict_post_hook(_forget_missing)

    def state_dict(self, *args: Any, destination: dict | None = None, prefix: str = "", keep_vars: bool = False) -> dict:
        return {} if destination is None else destination


def _note_prefix(module, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
    module.prefix = prefix


def _forget_missing(module, incompatible) -> None:
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.startswith(module.prefix)]


def base_parameters(module: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """named_parameters() of the base alone, tied ones once. It never looks where adapters are: a thread may add one."""
    seen = set() if seen is None else seen
    if isinstance(module, Unsaved):
        return
    for name, p in list(module._parameters.items()):
        if p is not None and id(p) not in seen:
            seen.add(id(p))
            yield prefix + name, p
    for name, child in list(module._modules.items()):
        if child is not None:
            yield from base_parameters(child, f"{prefix}{name}.", seen)


class Tap(Unsaved):
    """Lives as a child of the site's exit module, so `.to()`, FSDP and `parameters()` see its edits."""

    def __init__(self, site: Site, home: Any):
        super().__init__()
        self.name, self.role, self.span, self.home = site.name, site.role, site.span, home
        self.pres: dict[str, Edit] = {}               # adapter name -> edit, where the edit has that port
        self.posts: dict[str, Edit] = {}
        self.keeps: dict[str, Edit] = {}              # those that ask for the arguments of the layer's call
        self.names: set[str] = set()                  # the adapters in any of the three
        self.stacks, self.pools, self.heads_first = Stacks(), Pools(), site.heads_first
        columns = None if site.features is None else site.features.to(device_of(site.exit))
        self.register_buffer("features", columns, persistent=False)

    def add(self, adapter: str, edit: Edit) -> None:
        self.add_module(child(adapter), edit)
        self.pools.plan = None
        if type(edit).pre is not Edit.pre:
            self.pres[adapter] = edit
        if type(edit).post is not Edit.post:
            self.posts[adapter] = edit
        if edit.keeps_arguments:
            self.keeps[adapter] = edit
        self.names = {*self.pres, *self.posts, *self.keeps}

    def remove(self, adapter: str) -> None:
        edit = getattr(self, child(adapter))
        delattr(self, child(adapter))
        for port in (self.pres, self.posts, self.keeps):
            port.pop(adapter, None)
        self.names = {*self.pres, *self.posts, *self.keeps}
        self.stacks.forget(edit)
        self.pools.forget(edit)

    def context(self) -> Context:
        """The forward in progress; outside of one (a layer called by hand) the default adapters, on every row."""
        ctx = cell.ctx
        if ctx is not None and ctx.home is self.home:
            return ctx
        ids = wanted(self.home)
        ids = self.home.default if ids is UNSET else (ids,) if isinstance(ids, str) else ids
        flat = [n for row in ids for n in (row if isinstance(row, (tuple, dict)) else (row,))]
        names = [name for name in flat if name in self.posts or name in self.pres or name in self.keeps]
        if not names:
            return Context()
        edits = [port[name] for port in (self.pres, self.posts, self.keeps) for name in names if name in port]
        whole = any(e.needs_places or e.keeps_arguments or e.virtual and self.role != "embed" for e in edits)
        if self.span or whole or not isinstance(ids, tuple):
            raise UserError(f"adapter {names[0]!r} at {self.name} needs the whole model's forward, not a part of it")
        return Context(levels([tuple((name, 1.0) for name in names)]))

    def pre(self, x: Tensor, ctx: Context) -> Tensor:
        return self._run(self.pres, None, x, ctx)

    def post(self, x: Tensor, y: Tensor, ctx: Context, weight: Tensor | None = None) -> Tensor:
        """y edited; weight: the frozen one that made y of x, if that is all there was to it."""
        if self.features is None:
            return self._run(self.posts, x, y, ctx, weight)
        return y.index_copy(-1, self.features, self._run(self.posts, x, y[..., self.features], ctx))

    def _run(self, edits: dict[str, Edit], x: Tensor | None, t: Tensor, ctx: Context, weight: Tensor | None = None) -> Tensor:
        """Every edit the route asks for, level by level; x is None for an edit of the input itself. weight: see `post`."""
        if t.dim() == 2 and ctx.size and t.is_floating_point():           # (B*T, D): some models flatten around the MLP
            if t.shape[0] % ctx.size:
                raise UserError(f"a site saw {t.shape[0]} positions for {ctx.size} rows: its rows cannot be told apart")
            whole = t.reshape(ctx.size, -1, t.shape[-1])
            x = None if x is None else x.reshape(ctx.size, -1, x.shape[-1])
            return self._run(edits, x, whole, ctx, weight).reshape(t.shape)
        # One token a row, as in decoding, under one adapter each.
        pooled = x is not None and t.dim() == 3 and t.shape[1] == 1 and len(ctx.route) == 1 and ctx.size == len(t) \
            and len(ctx.rows) == ctx.size and not ctx.axis and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        for level in ctx.route:
            if pooled and (plan := self.pools.of(edits, level, t, ctx)).pool is not None:
                t, level = plan.run(x, t), plan.rest
            elif x is not None and t.dim() == 3 and low_rank.takes(x, t) and (spans := _spans(edits, level, t, ctx)):
                t = low_rank.added(x, t if weight is None else t.detach(), list(spans.values()), weight)
                level = tuple(part for part in level if part[0] not in spans)
            weight = None                             # t is not its output any more
            here = [(edits[name], rows, weight) for name, rows, weight in level if name in edits]
            if here:
                t = self._run_level(here, x, t, ctx)
        return t

    def _run_level(self, here: list[Part], x: Tensor | None, t: Tensor, ctx: Context) -> Tensor:
        if here[0][1] is None:
            return _edited(here[0], x, t, ctx, 0)
        along = ctx.axis if t.dim() == 3 or not ctx.axis else t.dim() - 2 if self.heads_first else 1
        singles: list[Part] = []
        for group in together(here):
            if len(group) == 1 or t.dim() != 3 and not group[0][0].by_row:
                singles += group
            else:
                stack = self.stacks.get([edit for edit, _, _ in group], t.dtype)
                t = run(group, stack, x, t, ctx)
        if all(isinstance(rows, slice) for _, rows, _ in singles):        # disjoint slices: one copy for all adapters
            pieces, done = [], 0
            for part in sorted(singles, key=lambda entry: entry[1].start):
                pieces += [t.narrow(along, done, part[1].start - done), _edited(part, x, t, ctx, along)]
                done = part[1].stop
            return torch.cat([*pieces, t.narrow(along, done, t.shape[along] - done)], along) if pieces else t
        for part in singles:
            rows = part[1]
            rows = torch.arange(rows.start, rows.stop, device=t.device) if isinstance(rows, slice) else rows.to(t.device)
            t = t.index_copy(along, rows, _edited(part, x, t, ctx, along))
        return t


def _spans(edits: dict[str, Edit], level: Level, t: Tensor, ctx: Context) -> dict[str, low_rank.Span]:
    """The adapters of a level whose change of their rows of t (B, T, D) kernels.low_rank computes."""
    found, whole = {}, t.shape[0] * t.shape[1]
    each = 1 if ctx.axis and t.shape[0] == 1 else 0 if ctx.axis else t.shape[1]
    for name, rows, weight in level:
        edit = edits.get(name)
        factors = edit.factors() if edit is not None and weight == 1.0 else None
        if factors is not None and (rows is None or isinstance(rows, slice) and each):
            span = low_rank.Span(*((0, whole) if rows is None else (rows.start * each, rows.stop * each)), *factors)
            if span.fits:
                found[name] = span
    return found


def _edited(part: Part, x: Tensor | None, t: Tensor, ctx: Context, along: int) -> Tensor:
    """What one edit makes of its rows of t, which count in dimension `along`; of the input's dimension `ctx.axis`."""
    edit, rows, weight = part
    now, own = cut(t, rows, along), ctx.only(rows)
    out = edit.pre(now, own) if x is None else edit.post(cut(x, rows, ctx.axis), now, own)
    out = out if out.dtype == t.dtype else out.to(t.dtype)
    return out if weight == 1.0 else now + weight * (out - now)


def child(adapter: str) -> str:
    """What an adapter's modules are called where they are children of others."""
    return "of_" + adapter.replace(".", "\u00b7")     # a submodule's name holds no dot; an adapter's may


# Hooks are module-level functions that read everything from `module`: a copied model's hooks see the copy.

def entry_hook(module: nn.Module, args: tuple) -> tuple | None:
    x = args[0]
    for tap in module.taps_in:
        if tap.pres or (tap.span and tap.posts):
            ctx = tap.context()
            x = tap.pre(x, ctx) if tap.pres else x
            if tap.span:
                ctx.scratch[tap.role] = x       # by role: layers run one after another, and share code
    return None if x is args[0] else (x, *args[1:])


def arguments_hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
    for tap in module.taps_in:
        if tap.keeps:
            ctx = tap.context()
            for level in ctx.route:
                for name, rows, _ in level:
                    if name in tap.keeps:
                        tap.keeps[name].arguments(kwargs, rows, ctx)


def exit_hook(module: nn.Module, args: tuple, out: Any) -> Any:
    y = out[0] if isinstance(out, tuple) else out     # some decoder layers give (hidden states, attention weights)
    edited = False
    for tap in module.taps_out:
        if tap.posts:
            ctx, edited = tap.context(), True
            if tap.span:
                y = tap.post(ctx.scratch.pop(tap.role, y), y, ctx)
            else:
                y = tap.post(args[0], y, ctx, _frozen(module, y) if tap is module.taps_out[0] else None)
    if not edited:
        return None
    return (y, *out[1:]) if isinstance(out, tuple) else y


def _frozen(module: nn.Module, y: Tensor) -> Tensor | None:
    """Its weight, if nobody wants a gradient of it and y is that of a plain linear in its dtype, with nothing after it but us."""
    plain = type(module) is nn.Linear and "forward" not in vars(module) and len(module._forward_hooks) == 1
    if not plain or not torch.is_grad_enabled() or any(p.requires_grad for p in module._parameters.values() if p is not None):
        return None
    return module.weight if module.weight.dtype is y.dtype else None          # under autocast it is another


def install(site: Site, home: Any) -> Tap:
    """Put a tap on a site. All hooks go in at attach and none later: a compiled model does not guard its hooks."""
    if "taps_out" not in site.exit.__dict__:
        site.exit.add_module("taps", nn.ModuleDict())
        site.exit.taps_out = []
        site.exit.register_forward_hook(exit_hook)
    if "taps_in" not in site.entry.__dict__:
        site.entry.taps_in = []
        site.entry.register_forward_pre_hook(entry_hook)
        if site.role == "block":
            site.entry.register_forward_pre_hook(arguments_hook, with_kwargs=True)
    tap = site.exit.taps[site.role] = Tap(site, home)
    site.exit.taps_out.append(tap)                    # a linear's own edits before its span's ...
    site.entry.taps_in.insert(0, tap)                 # ... and a span's before its first linear's
    return tap

"""Decoder layers that decode in one call (kernels/layer.py), in a copy of a model: which can, and for which forwards.

A layer can if it has the parts of Llama's by name, each already replaced by what computes it, and a probe of the whole agrees.
A forward goes so if it is of one token a row, with the caches here, and all that adapters change is LoRA on its linears; what else
comes, a hook or another method, goes by the layer's own modules.
"""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.evaluate.cache import grown
from tsugiki.kernels import low_rank, rows
from tsugiki.kernels.layer import LINEARS, LayerArgs, LinearArgs, NormArgs, step
from tsugiki.kernels.native import close
from tsugiki.kernels.one_token import NAME
from tsugiki.kernels.passes import GatedMLP, Norm
from tsugiki.pool import Plan, Pools
from tsugiki.route import Context, using
from tsugiki.tap import Tap, entry_hook, exit_hook

LOOK = 16                                             # steps


class _Own(threading.local):
    """What a thread keeps of the adapters that it decodes under: until others are attached, or the thread or the body ends."""
    names: tuple[str, ...] | None = None              # those attached
    pools: tuple[Pools, ...] = ()
    known: tuple[tuple[Plan | None, ...], LayerArgs] | None = None
    cache: weakref.ref | None = None                  # of the generation that goes on,
    count: int = 0                                    # and its steps


@dataclass(frozen=True)
class Step:
    """What stands in for a decoder layer's forward."""
    module: nn.Module
    plain: Callable[..., Tensor]
    args: LayerArgs
    linears: tuple[nn.Module, ...]                    # in the order of LINEARS
    hooks: tuple[tuple[dict, int], ...]               # of the parts, and how many there were, all of them taps'
    taps: tuple[Tap, ...]
    of: tuple[Tap | None, ...]                        # those at the outputs of the linears
    index: int                                        # of the layer
    others: tuple[tuple[dict, str, int], ...]         # the norms' weights and the biases, and where they lie
    own: _Own = field(default_factory=lambda: _Own(), compare=False)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = None if args else self._arguments(hidden_states, kwargs)
        if found is None:
            return self.plain(hidden_states, *args, **kwargs)
        layer, (cos, sin), cache, mask = found
        return step(layer, hidden_states, cos, sin, *cache.place(len(hidden_states), 1), mask)

    def _arguments(self, x: Tensor, kwargs: dict[str, Any]) -> tuple[LayerArgs, tuple[Tensor, Tensor], Any, Tensor | None] | None:
        """What `step` takes; None where it does not compute this."""
        config, mask, angles = self.module.self_attn.config, kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        caches = getattr(kwargs.get("past_key_values"), "layers", ())
        if torch.is_grad_enabled() or x.dtype is not torch.bfloat16 or x.dim() != 3 or x.shape[1] != 1 or len(x) > rows.MOST \
                or angles is None or self.index >= len(caches) or self.module.training \
                or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return None
        cache, (cos, sin) = caches[self.index], angles
        ready = getattr(cache, "is_initialized", False) and hasattr(cache, "place")
        turns = cos.dtype is sin.dtype is x.dtype and cos.shape == sin.shape and cos.is_contiguous() and sin.is_contiguous() \
            and cos.shape[1:] == (1, self.args.d) and len(cos) in (1, len(x))
        seen = mask is None or mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1) \
            and mask.shape[3] == cache.get_seq_length() + 1 and mask.stride(3) == 1 and len(mask) in (1, len(x))
        if not (ready and turns and seen) or config._attn_implementation != NAME or not self._as_built():
            return None
        layer = self._with_adapters(x, cache) if self.taps else self.args
        return None if layer is None else (layer, angles, cache, mask)

    def _as_built(self) -> bool:
        return all(len(hooks) == count for hooks, count in self.hooks) and not any(linear.changed for linear in self.linears) \
            and all(parameters[name].data_ptr() == at for parameters, name, at in self.others)

    def _with_adapters(self, x: Tensor, cache: Any) -> LayerArgs | None:
        """The arguments with the rows' own adapters; None if one changes more than outputs of linears, or by more than low rank.

        Factors that are written in place are copied anew when a generation begins, and every LOOK steps: to look at all of them
        costs as much as a step.
        """
        ctx, own, attached = self.taps[0].context(), self.own, self.taps[0].home.names()
        if own.names != attached:                     # what was removed must not stay here
            own.names, own.known, own.pools = attached, None, own.pools or tuple(Pools(1) for _ in self.of)
            for tap, pools in zip(self.of, own.pools, strict=True):
                pools.keep(() if tap is None else tap.posts.values())
        names = {name for level in ctx.route for name, _, _ in level}
        here = [tap for tap in self.taps if not names.isdisjoint(tap.names)]
        if not here:
            return self.args
        elsewhere = any(tap not in self.of or tap.pres for tap in here)
        if elsewhere or len(ctx.route) != 1 or ctx.size != len(x):
            return None
        own.count = own.count + 1 if own.cache is not None and own.cache() is cache else 0
        if own.count % LOOK and own.known is not None and self._holds(own.known[0], ctx):
            return own.known[1]
        own.cache = weakref.ref(cache)
        plans = tuple(pools.of(tap.posts, ctx.route[0], x, ctx) if tap in here else None
                      for tap, pools in zip(self.of, own.pools, strict=True))
        if any(p is not None and (p.pool is None or p.pool.rank > low_rank.MOST or any(name in tap.names for name, _, _ in p.rest))
               for p, tap in zip(plans, self.of, strict=True)):
            return None
        if own.known is None or any(a is not b for a, b in zip(own.known[0], plans, strict=True)):
            own.known = plans, self._changed(plans)
        return own.known[1]

    def _holds(self, plans: tuple[Plan | None, ...], ctx: Context) -> bool:
        """Whether the rows' adapters are those of these plans."""
        return all(plan is None or plan.rows == ctx.rows and [tap.posts.get(name) for name in plan.names] == [*plan.edits]
                   for plan, tap in zip(plans, self.of, strict=True))

    def _changed(self, plans: tuple[Plan | None, ...]) -> LayerArgs:
        new = LayerArgs.from_buffer_copy(self.args)
        for name, plan in zip(LINEARS, plans, strict=True):
            if plan is not None:
                linear, pool = getattr(new, name), plan.pool
                linear.a, linear.b, linear.scale = (t.data_ptr() for t in (pool.a, pool.b, pool.scale))
                linear.place, linear.rank = plan.place.data_ptr(), pool.rank
        return new


def step_of(layer: nn.Module) -> Step | None:
    """What stands in for this layer, a copy whose linears are laid out, whose norms and MLP are single passes; None if nothing."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or not isinstance(vars(mlp).get("forward") if mlp is not None else None, GatedMLP):
        return None
    try:
        made = _built(layer, attention, mlp)
    except AttributeError:                            # it has other parts
        return None
    return made if made is not None and _same(made) else None


def _built(layer: nn.Module, attention: nn.Module, mlp: nn.Module) -> Step | None:
    linears = tuple(getattr(attention if len(name) == 1 else mlp, f"{name}_proj") for name in LINEARS)
    modules = [layer.input_layernorm, layer.post_attention_layernorm, getattr(attention, "q_norm", None),
               getattr(attention, "k_norm", None)]
    norms = [None if m is None else vars(m).get("forward") for m in modules]
    if not all(isinstance(getattr(linear, "laid", None), rows.Laid) for linear in linears) \
            or not all(isinstance(n, Norm) for n, m in zip(norms, modules, strict=True) if m is not None):
        return None
    d, hidden = attention.head_dim, linears[0].in_features
    sizes = [(m.in_features, m.out_features) for m in linears]
    (_, q), (_, k), wide = sizes[0], sizes[1], sizes[4][1]
    fits = sizes == [(hidden, q), (hidden, k), (hidden, k), (q, hidden), (hidden, wide), (hidden, wide), (wide, hidden)] \
        and d % 32 == 0 and q % d == k % d == 0 and q // d % (k // d) == 0 \
        and all(n is None or len(n.module.weight) == size and n.module.weight.dtype is torch.bfloat16
                for n, size in zip(norms, (hidden, hidden, d, d), strict=True))
    parts = [attention, mlp, mlp.act_fn, *linears, *(m for m in modules if m is not None)]
    hooks = [h for part in parts for h in (part._forward_pre_hooks, part._forward_hooks)]
    if not fits or any(hook not in (entry_hook, exit_hook) for h in hooks for hook in h.values()):
        return None
    args = LayerArgs(
        *(NormArgs() if n is None else NormArgs(n.module.weight.data_ptr(), n.eps, n.offset, int(n.inner)) for n in norms),
        *(LinearArgs(m.laid.tiles.data_ptr(), None if m.bias is None else m.bias.data_ptr(), m.out_features, m.in_features)
          for m in linears), q // d, k // d, d, int(vars(mlp)["forward"].tanh), attention.scaling)
    others = [(n.module._parameters, "weight") for n in norms if n is not None]
    others += [(m._parameters, "bias") for m in linears if m.bias is not None]
    taps = {id(t): t for part in parts for name in ("taps_in", "taps_out") for t in vars(part).get(name, ())}
    of = (next((t for t in vars(m).get("taps_out", ()) if not t.span and t.features is None), None) for m in linears)
    return Step(layer, layer.forward, args, linears, tuple((h, len(h)) for h in hooks), tuple(taps.values()), tuple(of),
                attention.layer_idx, tuple((parameters, name, parameters[name].data_ptr()) for parameters, name in others))


@torch.no_grad()
def _same(made: Step) -> bool:
    """Whether both make the same of random numbers: small ones in the layer's stream, so that what it adds is seen, and large ones
    in its cache, so that every token's score matters."""
    args, g = made.args, torch.Generator().manual_seed(0)
    index, d, kv = made.index, args.d, args.kv_heads

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=g)).bfloat16()
    x, cos, sin = draw(2, 1, args.q.width, size=0.05), draw(2, 1, d), draw(2, 1, d)
    before = [draw(2, kv, 5, d, size=8.0) for _ in range(2)]
    mask = torch.arange(6).expand(2, 1, 1, 6) >= torch.tensor([0, 2]).view(2, 1, 1, 1)
    caches = grown(), grown()
    for cache in caches:
        cache.update(*before, index)
    theirs, ours = (cache.layers[index] for cache in caches)
    try:
        with using(made.taps[0].home if made.taps else None, None):           # the base alone
            wanted = made.plain(x, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=caches[0],
                                position_ids=torch.tensor([[5], [3]]), use_cache=True)
    except (TypeError, ValueError, RuntimeError, AttributeError):              # its forward takes something else
        return False
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape or wanted.dtype is not x.dtype:
        return False
    out = step(args, x, cos, sin, *ours.place(2, 1), mask)
    return all(close(a, b) for a, b in ((out, wanted), (ours.keys, theirs.keys), (ours.values, theirs.values)))

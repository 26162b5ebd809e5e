"""Bottleneck adapters against their papers' formulas, written out with plain hooks on a second model."""
import pytest
import torch
from tiny import EXACT, LOOSER, difference, fill, ids, tiny
from torch.nn import functional as F

from tsugiki.adapters import attach
from tsugiki.errors import UserError
from tsugiki.methods import Parallel, ParallelLinear, Pfeiffer, Series, SeriesLinear
from tsugiki.sites import FAMILIES

F64 = torch.float64
ACTS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu}


def bottleneck(edit, cfg):
    """f(h) = scale * up(act(down(h))), from the edit's tensors alone."""
    p = {name: t.detach() for name, t in edit.named_parameters()}
    return lambda h: cfg.scale * F.linear(ACTS[cfg.act](F.linear(h, p["down.weight"], p.get("down.bias"))), p["up.weight"],
                                          p.get("up.bias"))


def hook(model, adapter, cfg):
    """The formula of `cfg` at every site of the adapter, as hooks on a model of its own."""
    for site, edit in adapter.edits.values():
        f, entry, exit = bottleneck(edit, cfg), site.entry, site.exit
        names = {m: n for n, m in adapter.home.model.named_modules()}
        entry, exit = (model.get_submodule(names[m]) for m in (entry, exit))
        kept = {}
        columns = slice(None) if site.features is None else site.features

        def before(module, args, f=f):
            return (args[0] + f(args[0]), *args[1:])

        def keep(module, args, kept=kept):
            kept["x"] = args[0]

        def after(module, args, y, f=f, kept=kept, columns=columns):
            y = y.clone()
            y[..., columns] += f(kept["x"] if isinstance(cfg, (Parallel, ParallelLinear)) else y[..., columns])
            return y
        if isinstance(cfg, SeriesLinear) and site.role in cfg.before:
            exit.register_forward_pre_hook(before)
        else:
            entry.register_forward_pre_hook(keep)
            exit.register_forward_hook(after)
    return model


@pytest.mark.parametrize("kind", [k for k in FAMILIES if "moe" not in k and k != "mixtral"])     # they have no up and down
def test_every_placement_is_its_papers_formula_on_every_family(kind):
    gated = "gate" in FAMILIES[kind].linears
    cases = [Series(size=8), Pfeiffer(size=8, act="gelu", scale=0.5), Parallel(size=8),
             Parallel(size=8, targets=("attn",), act="silu"),
             SeriesLinear(size=8), SeriesLinear(size=8, targets=("up", "gate") if gated else ("down", "o")),
             ParallelLinear(size=8), ParallelLinear(size=8, targets=("q", "down"), bias=True)]
    for cfg in cases:
        if kind == "phi3" and isinstance(cfg, ParallelLinear):
            cfg = ParallelLinear(size=8, targets=("gate_up", "down"))
        adapters = attach(tiny(kind, F64))
        adapter = fill(adapters.add("a", cfg), seed=1)
        x = ids(2)
        with torch.no_grad():
            ours, base = adapters.model(x).logits, adapters.model(x, adapter_ids=()).logits
            formula = hook(tiny(kind, F64), adapter, cfg)(x).logits
        assert difference(ours, formula) <= LOOSER.get(kind, EXACT) and difference(ours, base) > 1e-3, cfg


def test_a_change_of_the_input_of_a_part_is_refused():
    with pytest.raises(UserError, match="changes its site's input"):
        attach(tiny("phi3")).add("a", SeriesLinear(targets=("up",)))

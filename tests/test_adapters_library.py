"""AdapterHub's `adapters` and we compute the same: its numbers on two tiny models, stored by scripts/peer_adapters.py.

That library pins an older transformers, so its side is on disk: tests/data/adapters holds the base's weights and, for each
case, its adapter's tensors, the input, the logits, and (cases.json) its config and the formula its code computes.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import difference, exact
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.adapters import Adapter, attach
from tsugiki.methods import METHODS, make
from tsugiki.sites import decoder_layers, sites

DATA = Path(__file__).parent / "data" / "adapters"
ABOUT = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
KINDS = tuple(ABOUT["models"])
NORMS = {"llama": {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}, "gpt2": {"attn": "ln_1", "mlp": "ln_2"}}
ACTS = {"swish": F.silu, "relu": F.relu, "gelu": F.gelu}
CLOSE = 1e-9                                          # float64; other versions order their sums otherwise
EFFECT = 1e-2
ANY = "any"                                           # whichever site of the layer the adapter sits on

Mapped = dict[tuple[int, str, str], Tensor]           # (layer, role of the site, our name of the parameter) -> values


def base(kind: str, norms: bool = True) -> nn.Module:
    """The base with the stored weights, in float64; without norms, those before attention and MLP let everything through."""
    config = AutoConfig.for_model(kind, **ABOUT["models"][kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    stored = {k.removeprefix("base."): v for k, v in load_file(DATA / f"{kind}.safetensors").items() if k.startswith("base.")}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    for layer in () if norms else decoder_layers(model):
        for name in NORMS[kind].values():
            setattr(layer, name, nn.Identity())
    return exact(model).requires_grad_(False)


def stored(kind: str, case: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What cases.json says of a case; the adapter's tensors under the library's names; input_ids, logits, attention_mask."""
    tensors = load_file(DATA / f"{kind}-{case}.safetensors")
    theirs = {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
    return ABOUT["cases"][f"{kind}-{case}"], theirs, {k: v for k, v in tensors.items() if not k.startswith("adapter.")}


def bottleneck(theirs: dict[str, Tensor]) -> Mapped:
    found = {}
    for name, value in theirs.items():
        if at := re.search(r"\.(\d+)\.(attention|output)_adapters\.adapters\.a\.adapter_(.+)\.(weight|bias)$", name):
            part = {"down.0": "down", "down.1": "down", "norm_before": "norm", "norm_after": "norm"}.get(at[3], at[3])
            found[int(at[1]), "attn" if at[2] == "attention" else "mlp", f"{part}.{at[4]}"] = value
    return found


def prefix(theirs: dict[str, Tensor]) -> Mapped:
    """Its one tensor for all layers, or the MLP that makes it, cut into the keys and values of each layer."""
    at = next(k.split("control_trans")[0] for k in theirs if "control_trans" in k)
    part = {k.removeprefix(at): v for k, v in theirs.items() if k.startswith(at)}
    if "control_trans" in part:
        made = part["control_trans"].view(3, 4, -1)                               # (tokens, 2 layers * [k, v], heads * d)
    else:
        hidden = torch.tanh(F.linear(part["wte.weight"], part["control_trans.0.weight"], part["control_trans.0.bias"]))
        made = F.linear(hidden, part["control_trans.2.weight"], part["control_trans.2.bias"]).view(3, 4, -1)
    return {(n, role, "tokens"): made[:, 2 * n + i] for n in range(2) for i, role in enumerate(("key", "value"))}


def mam(theirs: dict[str, Tensor]) -> Mapped:
    return prefix(theirs) | bottleneck(theirs)


def reft(theirs: dict[str, Tensor]) -> Mapped:
    """R with orthonormal columns; it was made by a QR, so that of another QR is the same, signs included."""
    names = {"projection.weight": "R", "learned_source.weight": "W.weight", "learned_source.bias": "W.bias"}
    found = {}
    for name, value in theirs.items():
        n, part = re.search(r"\.(\d+)\.reft_layer\.refts\.a\.units\.0\.(.+)$", name).groups()
        found[int(n), ANY, names[part]] = value.mT if names[part] == "R" else value
    return found


# Stored case -> (method, its settings, from the library's tensors to ours). pfeiffer_default (it reads the stream after the
# residual sum), pfeiffer_ln_after_sum and the *_normed_model cases (a parallel adapter that reads the stream before the
# norm) are formulas of the library that no method here computes; they are checked as formulas below.
CASES: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Tensor]], Mapped]]] = {
    "houlsby": ("series", dict(size=8, act="silu", scale=1.0), bottleneck),
    "houlsby_scaled": ("series", dict(size=8, act="gelu", scale=0.5), bottleneck),
    "pfeiffer": ("pfeiffer", dict(size=8, act="relu", scale=1.0), bottleneck),
    "pfeiffer_ln_before": ("pfeiffer", dict(size=8, act="relu", scale=1.0, norm="before"), bottleneck),
    "pfeiffer_ln_after": ("pfeiffer", dict(size=8, act="relu", scale=2.0, norm="after"), bottleneck),
    "parallel": ("parallel", dict(size=8, act="relu", scale=4.0, targets=["mlp"]), bottleneck),
    "parallel_attention": ("parallel", dict(size=8, act="relu", scale=4.0, targets=["attn"]), bottleneck),
    "prefix": ("prefix", dict(tokens=3), prefix),
    "prefix_mlp": ("prefix", dict(tokens=3), prefix),
    "mam": ("mam", dict(tokens=3, size=8, act="relu", scale=4.0), mam),
    "reft": ("reft", dict(rank=2, first=3, last=0), reft),
    "reft_padded": ("reft", dict(rank=2, first=3, last=0), reft),
}
MAPS = {"series": bottleneck, "pfeiffer": bottleneck, "parallel": bottleneck, "prefix": prefix, "mam": mam, "reft": reft}


def put(adapter: Adapter, mapped: Mapped) -> None:
    """Fill an adapter with the mapped tensors; every one must have its place, and every parameter its tensor."""
    left = dict(mapped)
    with torch.no_grad():
        for name, (site, edit) in adapter.edits.items():
            for key, p in edit.named_parameters():
                values = left.pop((site.layer, site.role if (site.layer, site.role, key) in left else ANY, key), None)
                assert values is not None and values.shape == p.shape, f"{name}.{key} {tuple(p.shape)}: no tensor that fits"
                p.copy_(values)
    assert not left, f"no place for {sorted(left)}"


def logits(model: nn.Module, run: dict[str, Tensor], virtual: int = 0) -> Tensor:
    """The library counts the text's positions from 0 behind a prefix too; we, as PEFT, from the prefix's end."""
    call = {k: v for k, v in run.items() if k != "logits"}
    if virtual:
        call["position_ids"] = torch.arange(run["input_ids"].shape[1])[None] - virtual
    return model(**call, use_cache=False).logits


def apart(a: Tensor, run: dict[str, Tensor]) -> float:
    """The largest difference from the stored logits at real tokens."""
    real = run.get("attention_mask", torch.ones_like(run["input_ids"])).bool()
    return difference(a[real], run["logits"][real])


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_base_gives_its_stored_logits(kind):
    data = load_file(DATA / f"{kind}.safetensors")
    for norms, key in ((True, "logits"), (False, "logits_without_norms")):
        assert difference(base(kind, norms)(data["input_ids"]).logits, data[key]) < CLOSE
    assert difference(data["logits"], data["logits_without_norms"]) > EFFECT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for case, (method, _, _) in CASES.items() if method in METHODS])
def test_our_method_with_the_librarys_tensors_gives_its_logits(kind, case):
    method, fields, mapping = CASES[case]
    about, theirs, run = stored(kind, case)
    model = base(kind, about["norms"])
    plain = logits(model, run)
    adapter = attach(model).add("a", make(method, **fields))
    put(adapter, mapping(theirs))
    assert apart(logits(model, run, adapter.virtual), run) < CLOSE
    assert apart(plain, run) > EFFECT


def test_prefix_positions_are_where_the_library_departs_from_peft():
    """Read as PEFT reads them (text positions count from the prefix's end), its tensors give other logits."""
    _, theirs, run = stored("llama", "prefix")
    model = base("llama")
    put(attach(model).add("a", make("prefix", tokens=3)), prefix(theirs))
    assert apart(logits(model, run), run) > EFFECT > CLOSE > apart(logits(model, run, 3), run)


# The formulas of cases.json in plain torch hooks: they hold whether or not a method here computes them.

def update(mapped: Mapped, layer: int, role: str, config: dict[str, Any], z: Tensor) -> Tensor:
    """s up(act(down(z))), with a norm before if the config has one."""
    w = {key: value for (n, r, key), value in mapped.items() if (n, r) == (layer, role)}
    if config["ln_before"]:
        z = F.layer_norm(z, z.shape[-1:], w["norm.weight"], w["norm.bias"])
    hidden = ACTS[config["non_linearity"]](F.linear(z, w["down.weight"], w["down.bias"]))
    return config["scaling"] * F.linear(hidden, w["up.weight"], w["up.bias"])


def first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def hook_parallel(model: nn.Module, kind: str, site: Any, f: Callable[[Tensor], Tensor], *, normed: bool) -> None:
    """y + f(r), r what the block's norm gets; or what it gives, when normed."""
    kept = {}
    norm = getattr(decoder_layers(model)[site.layer], NORMS[kind][site.role])
    norm.register_forward_hook(lambda m, x, y: kept.update(r=y if normed else x[0]))
    site.exit.register_forward_hook(lambda m, x, y: y + f(kept["r"]))


def hook_bottlenecks(model: nn.Module, kind: str, config: dict[str, Any], mapped: Mapped, *, normed: bool = False) -> None:
    """What the library's bottleneck config computes, at every place the mapped tensors name."""
    places = {(s.layer, s.role): s for s in sites(model)}
    for n, role in sorted({key[:2] for key in mapped if key[2] == "up.weight"}):
        def f(z: Tensor, n: int = n, role: str = role) -> Tensor:
            return update(mapped, n, role, config, z)

        def series(m: nn.Module, x: tuple, y: Tensor, n: int = n, role: str = role) -> Tensor:
            change = update(mapped, n, role, config, y)
            if not config["ln_after"]:
                return y + change
            norm = (y.shape[-1:], mapped[n, role, "norm.weight"], mapped[n, role, "norm.bias"])
            return F.layer_norm(y + change, *norm) if config["adapter_residual_before_ln"] else y + F.layer_norm(change, *norm)
        if config["is_parallel"]:
            hook_parallel(model, kind, places[n, role], f, normed=normed)
        elif config["original_ln_before"]:            # on the MLP's side alone: the layer's output is the residual sum
            assert role == "mlp"
            decoder_layers(model)[n].register_forward_hook(lambda m, x, h, f=f: first(h, lambda s: s + f(s)))
        else:
            places[n, role].exit.register_forward_hook(series)


def hook_reft(model: nn.Module, config: dict[str, Any], mapped: Mapped, mask: Tensor) -> None:
    """h + (W h + b - R h)^T R at the first real tokens of each row."""
    real = mask.cumsum(1)
    here = (mask.bool() & (real <= config["prefix_positions"]))[..., None]
    for n, layer in enumerate(decoder_layers(model)):
        w, b, r = (mapped[n, ANY, k] for k in ("W.weight", "W.bias", "R"))
        assert difference(r.mT @ r, torch.eye(r.shape[1], dtype=r.dtype)) < CLOSE > difference(torch.linalg.qr(r).Q, r)

        def change(h: Tensor, w: Tensor = w, b: Tensor = b, r: Tensor = r) -> Tensor:
            return torch.where(here, h + (F.linear(h, w, b) - h @ r) @ r.mT, h)
        layer.register_forward_hook(lambda m, x, h, change=change: first(h, change))


def parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return config["configs"] if "configs" in config else [config]


def by_formula(kind: str, case: str, *, normed: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits by the formula, logits of the base, and what is stored."""
    about, theirs, run = stored(kind, case)
    model = base(kind, about["norms"])
    plain, virtual = logits(model, run), 0
    mapped = MAPS[CASES[case][0] if case in CASES else case.split("_")[0]](theirs)
    for config in parts(about["config"]):
        if config.get("architecture") == "prefix_tuning":
            virtual = config["prefix_length"]
            put(attach(model).add("a", make("prefix", tokens=virtual)), {k: v for k, v in mapped.items() if k[2] == "tokens"})
        elif config.get("architecture") == "reft":
            hook_reft(model, config, mapped, run.get("attention_mask", torch.ones_like(run["input_ids"])))
        else:
            hook_bottlenecks(model, kind, config, mapped, normed=normed)
    return logits(model, run, virtual), plain, run


@pytest.mark.parametrize("name", ABOUT["cases"])
def test_the_stated_formula_gives_the_librarys_logits(name):
    about = ABOUT["cases"][name]
    ours, plain, run = by_formula(about["model"], about["case"])
    assert apart(ours, run) < CLOSE
    assert apart(plain, run) > EFFECT


@pytest.mark.parametrize("kind", KINDS)
def test_its_parallel_adapter_reads_the_stream_before_the_norm(kind):
    """On a model with norms the two readings differ; with the norms taken out they are one."""
    assert apart(by_formula(kind, "parallel_normed_model", normed=True)[0], stored(kind, "parallel_normed_model")[2]) > EFFECT
    assert apart(by_formula(kind, "parallel", normed=True)[0], stored(kind, "parallel")[2]) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_methods_names_stored_cases(kind):
    assert {f"{kind}-{case}" for case in CASES} <= ABOUT["cases"].keys()

"""Every family's sites are where the table says, as wide as the modules are; parts of fused weights are the right columns."""
import pytest
import torch
from tiny import FALCONS, ids, tiny

from tsugiki.adapters import attach
from tsugiki.errors import UserError
from tsugiki.methods import BitFit, LoRA
from tsugiki.sites import FAMILIES, LINEAR_ROLES, SHARED_GATE, Family, family_of, select, sites
from tsugiki.sites import width as hidden

CASES = [(kind, {}) for kind in FAMILIES] + [("falcon", v) for v in FALCONS.values()] + [
    ("phi", {"qk_layernorm": True}), ("opt", {"do_layer_norm_before": False}), ("gpt_neox", {"use_parallel_residual": False})]
NAMES = list(FAMILIES) + [f"falcon-{k}" for k in FALCONS] + ["phi-qk_norm", "opt-post_norm", "gpt_neox-serial"]


@pytest.mark.parametrize("kind, overrides", CASES, ids=NAMES)
def test_names_are_unique_and_every_site_sees_the_widths_it_declares(kind, overrides):
    model = tiny(kind, **overrides)
    found = sites(model)
    assert len({s.name for s in found}) == len(found)
    assert {s.d_out for s in found if s.role == "block"} == {hidden(model)}
    seen = {}
    for site in found:
        def note_in(m, a, site=site):
            seen[site.name, "in"] = a[0].shape

        def note_out(m, a, y, site=site):
            seen[site.name, "out"] = (y[0] if isinstance(y, tuple) else y).shape
        site.entry.register_forward_pre_hook(note_in)
        site.exit.register_forward_hook(note_out)
    model(input_ids=ids(2))
    for site in found:
        width = seen[site.name, "out"][-1]
        if site.role in ("query", "key") and len(seen[site.name, "out"]) == 4:      # a norm of it sees heads apart
            width *= seen[site.name, "out"][1 if site.heads_first else 2]
            assert seen[site.name, "out"][2 if site.heads_first else 1] == 10
        if site.features is None:
            assert width == site.d_out, site.name
        else:
            assert len(site.features) == site.d_out and int(site.features.max()) < width
        if site.role not in ("embed", "query", "key"):
            assert seen[site.name, "in"][-1] == site.d_in, site.name


@pytest.mark.parametrize("kind, overrides", CASES, ids=NAMES)
def test_keys_and_values_are_what_the_cache_holds(kind, overrides):
    """The value site's output, cut into heads, is the cache's value; without rotation the key site's output is its key."""
    model = tiny(kind, torch.float64, **overrides)
    adapters = attach(model)
    values = [s for s in adapters.sites if s.role == "value"]
    keys = [s for s in adapters.sites if s.role == "key"]
    got = {}
    for site in values + keys:
        def note(m, a, y, site=site):
            got[site.name] = y if site.features is None else y[..., site.features]
        site.exit.register_forward_hook(note)
    cache = model(input_ids=ids(2), use_cache=True).past_key_values
    for n, site in enumerate(values):
        heads = got[site.name].unflatten(-1, (-1, site.head_dim)).transpose(1, 2)      # (B, H, T, d)
        cached = cache.layers[n].values
        assert torch.equal(heads.repeat_interleave(cached.shape[1] // heads.shape[1], 1), cached)
    for n, site in enumerate(keys):                   # position 0 is not rotated
        y = got[site.name]
        first = y[:, :, 0] if site.heads_first else y[:, 0].reshape(2, -1, site.head_dim)
        cached = cache.layers[n].keys[:, :, 0]
        first = first.repeat_interleave(cached.shape[1] // first.shape[1], 1)
        assert float((first - cached).abs().max()) < 1e-12, site.name


@pytest.mark.parametrize("kind", [k for k, f in FAMILIES.items() if f.fused])
def test_editing_all_parts_of_a_fused_weight_is_editing_it_whole(kind):
    """An offset on every part, each column counted, equals one offset on the whole."""
    model = tiny(kind, torch.float64)
    adapters = attach(model)
    fused = FAMILIES[kind].fused
    parts = tuple(r for role in fused for r in (("q", "k", "v") if role == "qkv" else ("gate", "up")))
    whole = adapters.add("whole", BitFit(targets=tuple(fused)))
    part = adapters.add("parts", BitFit(targets=parts))
    for name, p in whole.parameters().items():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for site, edit in part.edits.values():
            if name == f"{site.module}.offset":
                edit.offset.data = p.data[site.features].clone()
    a, b = (model(input_ids=ids(2), adapter_ids=n).logits for n in ("whole", "parts"))
    assert float((a - b).abs().max()) <= 1e-12
    assert float((a - model(input_ids=ids(2), adapter_ids=()).logits).abs().max()) > 1e-3


def test_linear_means_every_linear_of_the_layers_but_gates_of_experts_and_no_part_of_one():
    for kind in FAMILIES:
        model = tiny(kind)
        layers = model.get_submodule(FAMILIES[kind].layers)
        inside = {m for layer in layers for m in layer.modules() if type(m).__name__ in ("Linear", "Conv1D", "FalconLinear")}
        inside -= {s.exit for s in sites(model) if s.role == SHARED_GATE}
        chosen = select(sites(model), "linear", LINEAR_ROLES, "x")
        assert {s.exit for s in chosen} == inside and len(chosen) == len(inside), kind


def test_roles_and_regexes_select_sites():
    found = sites(tiny("phi3"))
    names = lambda targets: [s.name for s in select(found, targets, (*LINEAR_ROLES, "head"), "lora")]     # noqa: E731
    assert names(("q",)) == names("q") == [f"model.layers.{n}.self_attn.qkv_proj.q" for n in (0, 1)]
    assert names(r"layers\.1\.self_attn\.qkv_proj") == ["model.layers.1.self_attn.qkv_proj"]      # whole: not its parts too
    assert names(r"qkv_proj\.v$") == [f"model.layers.{n}.self_attn.qkv_proj.v" for n in (0, 1)]
    assert names("head") == ["lm_head"]


@pytest.mark.parametrize("targets, says", [
    (("qkv",), "no site has the role 'qkv'"), (("downn",), "did you mean 'down'"), ("nothing_here", "no site name matches"),
    ("(", "not a regular expression"), (("attn",), "(roles here: q k v o gate up down head)")])
def test_targets_that_match_nothing_are_one_line_with_the_roles_there_are(targets, says):
    adapters = attach(tiny("llama"))
    with pytest.raises(UserError) as e:
        adapters.add("a", LoRA(targets=targets))
    assert says in str(e.value) and "\n" not in str(e.value)
    assert adapters.names() == () and not list(adapters.model.adapter_shared.children())


def test_an_unknown_family_is_one_line_and_can_be_described():
    model = tiny("llama")
    model.config.model_type = "lama"
    with pytest.raises(UserError) as e:
        attach(model)
    text = str(e.value)
    assert all(part in text for part in ("'lama'", "'llama'", "falcon", "family=tsugiki.sites.Family(")) and "\n" not in text
    family = Family("model.layers", "model.embed_tokens", FAMILIES["llama"].linears)
    assert attach(model, family=family).sites
    wrong = tiny("llama")
    with pytest.raises(UserError, match="has no 'model.blocks', which its family names as its layers"):
        attach(wrong, family=Family("model.blocks", "model.embed_tokens", {}))
    assert "adapters" not in wrong.__dict__ and not wrong._forward_hooks


def test_bias_flags_name_real_config_fields_and_the_linears_they_reach():
    for kind, family in FAMILIES.items():
        for flag, roles in family.bias_flags.items():
            off, on = tiny(kind, **{flag: False}), tiny(kind, **{flag: True})
            for a, b in zip(sites(off), sites(on), strict=True):
                if a.role in LINEAR_ROLES and a.features is None:
                    differs = (getattr(a.exit, "bias", None) is None) != (getattr(b.exit, "bias", None) is None)
                    assert differs == (a.role in roles), (kind, flag, a.role)
    assert family_of(tiny("bloom")) is FAMILIES["bloom"]

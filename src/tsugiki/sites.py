"""Where an adapter can act: the table of model families, and the sites it yields. The only file that knows families."""
from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from . import patterns
from .errors import UserError, nearest
from .weights import dims

LINEAR_ROLES = ("q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down")
SHARED_GATE = "shared_gate"                           # the one number a token by which a shared expert's output is weighed
ROLES = ("embed", "norm", *LINEAR_ROLES, SHARED_GATE, "attn", "mlp", "query", "key", "value", "block", "head")


@dataclass(frozen=True)
class Family:
    """One model family as data: paths, how fused projections lie, and which config flags declare biases."""
    layers: str                                       # path of the ModuleList of decoder layers
    embed: str                                        # path of the token embedding
    linears: Mapping[str, str]                        # role -> path inside one layer
    head_dim: str = "self_attn.head_dim"              # path inside one layer to the attribute holding the head size
    fused: Mapping[str, str] = field(default_factory=dict)   # role -> layout, one of LAYOUTS
    key_out: str | None = None                        # module giving the key just before rotary, where it is not k
    query_out: str | None = None                      # the same for the query
    sincos: str | None = None                         # path inside one layer to a table of (sin, cos) that turns pairs of features
    scaling: str | None = None                        # path inside one layer to what attention scores are multiplied with
    key_heads_first: bool = False                     # key_out sees (B, H, T, D), not (B, T, H, D) or (B, T, H*D)
    head: str = "lm_head"
    rotary: str | None = None                         # module whose attention_scaling multiplies rotated keys
    positions_from_mask: bool = False                 # the model counts positions from the mask when none are given
    repeats_keys: str | None = None                   # attribute in a layer: the cache holds every query head's key
    peft_has_its_attention: bool = False              # PEFT's LLaMA-Adapter knows the family
    bias_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # config field -> roles it gives a bias
    experts: str | None = None                        # path inside one layer to its stacked experts, in layers that have them
    shared: Mapping[str, str] = field(default_factory=dict)  # in such layers, the shared expert's: role -> path
    peft_means_experts: tuple[str, ...] = ()          # roles whose linears' names PEFT's LoRA takes for stacked experts


def _linears(attention: str, q: str, mlp: str) -> dict[str, str]:
    """`_linears("self_attn", "q_proj k_proj v_proj o_proj", "up=mlp.fc1 down=mlp.fc2")`; one name is a fused qkv."""
    names = q.split()
    roles = ("q", "k", "v", "o") if len(names) == 4 else ("qkv", "o")
    found = {role: f"{attention}.{name}" for role, name in zip(roles, names, strict=True)}
    return found | dict(pair.split("=") for pair in mlp.split())


GATED = "gate=mlp.gate_proj up=mlp.up_proj down=mlp.down_proj"
FOUR_H = "up=mlp.dense_h_to_4h down=mlp.dense_4h_to_h"
ATTENTION_BIAS = {"attention_bias": ("q", "k", "v", "o")}
LLAMA = Family("model.layers", "model.embed_tokens", _linears("self_attn", "q_proj k_proj v_proj o_proj", GATED),
               rotary="model.rotary_emb")
GEMMA = replace(LLAMA, bias_flags=ATTENTION_BIAS, scaling="self_attn.scaling")
MIXTRAL = replace(LLAMA, experts="mlp.experts", peft_means_experts=("gate", "up", "down"))
NORMED_MOE = replace(MIXTRAL, bias_flags=ATTENTION_BIAS, scaling="self_attn.scaling", key_out="self_attn.k_norm",
                     query_out="self_attn.q_norm")
BLOOM = Family("transformer.h", "transformer.word_embeddings",
               _linears("self_attention", "query_key_value dense", FOUR_H), head_dim="self_attention.head_dim",
               fused={"qkv": "grouped"})

FAMILIES: dict[str, Family] = {
    "llama": replace(LLAMA, peft_has_its_attention=True, bias_flags=ATTENTION_BIAS | {"mlp_bias": ("gate", "up", "down")}),
    "mistral": replace(LLAMA, peft_has_its_attention=True),
    "qwen2": LLAMA,
    "qwen3": replace(GEMMA, key_out="self_attn.k_norm", query_out="self_attn.q_norm"),
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": replace(GEMMA, key_out="self_attn.k_norm", query_out="self_attn.q_norm", key_heads_first=True),
    "olmo2": replace(GEMMA, key_out="self_attn.k_norm", query_out="self_attn.q_norm"),
    "mixtral": MIXTRAL,
    "qwen2_moe": replace(MIXTRAL, bias_flags={"qkv_bias": ("q", "k", "v")}, peft_means_experts=(),
                         shared={"gate": "mlp.shared_expert.gate_proj", "up": "mlp.shared_expert.up_proj",
                                 "down": "mlp.shared_expert.down_proj", SHARED_GATE: "mlp.shared_expert_gate"}),
    "qwen3_moe": NORMED_MOE,
    "olmoe": NORMED_MOE,
    "phi": replace(LLAMA, linears=_linears("self_attn", "q_proj k_proj v_proj dense", "up=mlp.fc1 down=mlp.fc2"),
                   key_out="self_attn.k_layernorm", query_out="self_attn.q_layernorm", key_heads_first=True),
    "phi3": replace(LLAMA, linears=_linears("self_attn", "qkv_proj o_proj",
                                            "gate_up=mlp.gate_up_proj down=mlp.down_proj"),
                    fused={"qkv": "concat", "gate_up": "halves"}),
    "gpt2": Family("transformer.h", "transformer.wte", _linears("attn", "c_attn c_proj", "up=mlp.c_fc down=mlp.c_proj"),
                   head_dim="attn.head_dim", fused={"qkv": "concat"}),
    "gptj": Family("transformer.h", "transformer.wte",
                   _linears("attn", "q_proj k_proj v_proj out_proj", "up=mlp.fc_in down=mlp.fc_out"),
                   head_dim="attn.head_dim", sincos="attn.embed_positions"),
    "gpt_neox": Family("gpt_neox.layers", "gpt_neox.embed_in", _linears("attention", "query_key_value dense", FOUR_H),
                       head_dim="attention.head_size", fused={"qkv": "grouped"}, rotary="gpt_neox.rotary_emb",
                       bias_flags={"attention_bias": ("qkv", "o")}),
    "bloom": BLOOM,
    "falcon": replace(BLOOM, repeats_keys="self_attention.new_decoder_architecture",
                      bias_flags={"bias": ("qkv", "o", "up", "down")}),
    "opt": Family("model.decoder.layers", "model.decoder.embed_tokens",
                  _linears("self_attn", "q_proj k_proj v_proj out_proj", "up=fc1 down=fc2"),
                  positions_from_mask=True, bias_flags={"enable_bias": ("q", "k", "v", "o", "up", "down")}),
}


@dataclass(frozen=True, eq=False)
class Site:
    """One place: x goes in at `entry`, y comes out of `exit` (the same module for a linear, q..o or up..down for a span)."""
    name: str
    role: str
    layer: int                                        # -1 outside the layers
    entry: nn.Module
    exit: nn.Module
    d_in: int
    d_out: int
    module: str                                       # path of `exit` in the model
    features: torch.Tensor | None = field(default=None, repr=False)   # columns of exit's output that are this site
    heads_first: bool = False                         # y is (B, H, T, D)
    head_dim: int = 0                                 # of a query, key or value
    key_scale: float = 1.0                            # what the model multiplies a rotated key with
    repeated: bool = False                            # the cache repeats this key for each query head
    score_scale: float = 1.0                          # of a query: what the model multiplies its scores with
    sincos: torch.Tensor | None = field(default=None, repr=False)     # of a query: table of (sin, cos) by position, for pairs

    @property
    def span(self) -> bool:
        return self.entry is not self.exit


def _concat(width: int, d_out: int, head_dim: int) -> dict[str, torch.Tensor]:
    """[q | k | v]; `width` is q's."""
    columns, kv = torch.arange(d_out), (d_out - width) // 2
    return dict(zip("qkv", columns.split([width, kv, kv]), strict=True))


def _grouped(width: int, d_out: int, head_dim: int) -> dict[str, torch.Tensor]:
    """[groups, (q heads of the group, k, v), head_dim]: GPT-NeoX and BLOOM (a group a head), Falcon's three layouts."""
    groups = (d_out - width) // (2 * head_dim)
    columns = torch.arange(d_out).view(groups, -1, head_dim)
    return {"q": columns[:, :-2].flatten(), "k": columns[:, -2].flatten(), "v": columns[:, -1].flatten()}


def _halves(width: int, d_out: int, head_dim: int) -> dict[str, torch.Tensor]:
    return dict(zip(("gate", "up"), torch.arange(d_out).chunk(2), strict=True))


LAYOUTS = {"concat": _concat, "grouped": _grouped, "halves": _halves}


def family_of(model: nn.Module) -> Family:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UserError(f"model family {kind!r} is not known{nearest(kind, FAMILIES)} (known: {' '.join(FAMILIES)}); "
                        "describe it with attach(model, family=tsugiki.sites.Family(...))")
    return FAMILIES[kind]


def find(model: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UserError(f"{type(model).__name__} has no {path!r}, which its family names as its {what}") from None


def decoder_layers(model: nn.Module, family: Family | None = None) -> nn.ModuleList:
    """The decoder layers in order, as torch.compile or sharding wants them."""
    return find(model, (family or family_of(model)).layers, "layers")


def width(model: nn.Module) -> int:
    """The hidden width of a model: of its token embeddings, which every Hugging Face model tells, known family or not."""
    return model.get_input_embeddings().weight.shape[1]


def _value(layer: nn.Module, path: str) -> object:
    """An attribute of a module inside a layer: "self_attn.head_dim"."""
    owner, _, name = path.rpartition(".")
    return getattr(layer.get_submodule(owner), name)


def sites(model: nn.Module, family: Family | None = None) -> list[Site]:
    """Every site of a model, in forward order of the layers. Raises UserError for a family that is not known."""
    fam = family or family_of(model)
    found = []
    for role, path in (("embed", fam.embed), ("head", fam.head)):
        module = find(model, path, role)
        found.append(Site(path, role, -1, module, module, *dims(module), path))
    rotary = find(model, fam.rotary, "rotary") if fam.rotary else None
    scale = float(getattr(rotary, "attention_scaling", 1.0))
    layers = find(model, fam.layers, "layers")
    for n, layer in enumerate(layers):
        found[-1:-1] = _layer_sites(fam, layer, n, scale)          # the head stays last
    inside, inner = set(layers.modules()), find(model, fam.layers.rpartition(".")[0], "decoder")
    found[-1:-1] = _norms(inner, fam.layers.rpartition(".")[0], -1, inside)
    return found


def _norms(module: nn.Module, path: str, n: int, without: Container[nn.Module] = ()) -> Iterator[Site]:
    """Every module in `module` that scales its features by a vector: layer norms and RMS norms."""
    for name, m in module.named_modules():
        weight = m._parameters.get("weight")
        if m not in without and weight is not None and weight.dim() == 1:
            yield Site(f"{path}.{name}", "norm", n, m, m, len(weight), len(weight), f"{path}.{name}")


def _sparse_block(fam: Family, layer: nn.Module) -> str | None:
    """The path of the module around a layer's experts: router, experts, shared expert. None where the layer is dense."""
    try:
        return layer.get_submodule(fam.experts) and fam.experts.rpartition(".")[0] if fam.experts else None
    except AttributeError:
        return None


def _layer_sites(fam: Family, layer: nn.Module, n: int, scale: float) -> Iterator[Site]:
    """The sites of one layer.

    transformers keeps experts as stacked parameters, (experts, out, in) each, and gives every expert the tokens the router
    picked. No linear holds them, so a sparse layer has its attention, "mlp" as the whole sparse block and, of a shared
    expert, which sees all tokens as (B*T, D), ordinary `gate`, `up` and `down`. Dense layers of the same model have it all.
    """
    prefix, sparse, linears = f"{fam.layers}.{n}", _sparse_block(fam, layer), fam.linears
    if sparse:
        linears = {role: path for role, path in linears.items() if not path.startswith(f"{sparse}.")} | fam.shared
    at = {role: Site(f"{prefix}.{path}", role, n, m := find(layer, path, role), m, *dims(m), f"{prefix}.{path}")
          for role, path in linears.items()}
    yield from _norms(layer, prefix, n)
    yield from at.values()
    head_dim = int(_value(layer, fam.head_dim))
    parts = dict(at)
    for role, layout in fam.fused.items():
        if (whole := at.get(role)) is None:
            continue
        for part, columns in LAYOUTS[layout](at["o"].d_in, whole.d_out, head_dim).items():
            parts[part] = replace(whole, name=f"{whole.name}.{part}", role=part, features=columns, d_out=len(columns))
            yield parts[part]
    for part, role in (("q", "query"), ("k", "key"), ("v", "value")):
        yield _query_key_or_value(fam, layer, parts[part], role, prefix, head_dim, scale)
    width = parts["o"].d_out
    for role, first, last in (("attn", "q", "o"), ("mlp", "up", "down")):
        if role == "mlp" and sparse:
            block = layer.get_submodule(sparse)
            yield Site(f"{prefix}.{role}", role, n, block, block, width, width, f"{prefix}.{sparse}")
        else:
            first, last = parts[first], parts[last]
            yield Site(f"{prefix}.{role}", role, n, first.entry, last.exit, first.d_in, last.d_out, last.module)
    yield Site(f"{prefix}.block", "block", n, layer, layer, width, width, prefix)


def _query_key_or_value(fam: Family, layer: nn.Module, part: Site, role: str, prefix: str, head_dim: int, scale: float) -> Site:
    """Where a query, key or value leaves its last module before rotary positions and the cache."""
    repeated = bool(fam.repeats_keys and _value(layer, fam.repeats_keys)) and role != "query"
    site = replace(part, name=f"{prefix}.{role}", role=role, head_dim=head_dim, repeated=repeated)
    if role == "query":
        site = replace(site, score_scale=float(_value(layer, fam.scaling)) if fam.scaling else head_dim ** -0.5,
                       sincos=_value(layer, fam.sincos) if fam.sincos else None)
    path = {"query": fam.query_out, "key": fam.key_out, "value": None}[role]
    if path is None or not hasattr(layer.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]):
        return replace(site, key_scale=scale) if role == "key" else site
    norm = layer.get_submodule(path)
    return replace(site, entry=norm, exit=norm, module=f"{prefix}.{path}", heads_first=fam.key_heads_first,
                   d_in=site.d_out, features=None, key_scale=scale if role == "key" else 1.0)


def rotate(site: Site, query: torch.Tensor, positions: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    """A query (B, H, T, d) with its rotary positions, as the model turns it.

    positions: (cos, sin), each (B or 1, T, width), for features in halves; (ids,) for pairs with a table; None for none.
    """
    if positions is None or (len(positions) == 1 and site.sincos is None):
        return query
    if len(positions) == 1:                           # GPT-J: features 2i and 2i + 1 turn together
        sin, cos = (t.repeat_interleave(2, -1) for t in site.sincos.to(query.device)[positions[0]].chunk(2, -1))
    else:
        cos, sin = positions
    cos, sin = (t.to(query.dtype).unsqueeze(1) for t in (cos, sin))           # (B, 1, T, width)
    turned, rest = query.split([cos.shape[-1], query.shape[-1] - cos.shape[-1]], -1)
    if len(positions) == 1:
        swapped = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        swapped = torch.cat([-second, first], -1)
    return torch.cat([turned * cos + swapped * sin, rest], -1)


def select(all_sites: Sequence[Site], targets: tuple[str, ...] | str, allowed: tuple[str, ...], who: str,
           default: bool = False) -> list[Site]:
    """The sites that `targets` name: roles, one regex over names, or "linear" (every linear of the layers, fused whole; not
    the gate of a shared expert).

    default: the roles are a method's own choice, so those that the model does not have are left out, as long as it has one.
    Raises UserError for a role or regex that matches nothing; a regex that names a fused linear does not also match its parts.
    """
    here = [s for s in all_sites if s.role in allowed]
    roles = " ".join(r for r in allowed if any(s.role == r for s in here))
    stacked = any(s.role == "mlp" and not s.span for s in all_sites)
    hint = "; experts are stacked parameters, which no linear holds: method full trains them" if stacked else ""
    if targets == "linear":
        return [s for s in here if s.role in LINEAR_ROLES and s.features is None]
    if isinstance(targets, str) and targets not in ROLES:
        try:
            chosen = [s for s in here if patterns.search(targets, s.name)]
        except UserError as e:
            raise UserError(f"{who}: targets {e}") from None
        whole = {s.name for s in chosen if s.features is None}
        chosen = [s for s in chosen if s.features is None or s.module not in whole]
        if not chosen:
            raise UserError(f"{who}: no site name matches {targets!r}; roles here: {roles}; "
                            f"a name here: {here[len(here) // 2].name}{hint}")
        return chosen
    wanted = (targets,) if isinstance(targets, str) else targets
    missing = [role for role in wanted if role not in roles.split()]
    if missing and not (default and len(missing) < len(wanted)):
        close = hint if stacked and missing[0] in LINEAR_ROLES else nearest(missing[0], roles.split())
        raise UserError(f"{who}: no site has the role {missing[0]!r}{close} (roles here: {roles})")
    return [s for s in here if s.role in wanted]


def shortest(all_sites: Sequence[Site], names: set[str], usual: tuple[str, ...] | str = ()) -> tuple[str, ...] | str:
    """The shortest `targets` that name exactly these sites: "linear", a method's usual roles, roles, one regex."""
    if names == {s.name for s in all_sites if s.role in LINEAR_ROLES and s.features is None}:
        return "linear"
    if isinstance(usual, tuple) and names == {s.name for s in all_sites if s.role in usual}:
        return usual
    roles = tuple(r for r in ROLES if any(s.role == r and s.name in names for s in all_sites))
    if names == {s.name for s in all_sites if s.role in roles}:
        return roles
    return "^(" + "|".join(re.escape(n) for n in sorted(names)) + ")$"

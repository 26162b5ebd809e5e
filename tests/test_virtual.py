"""Prompts and prefixes: equal to transformers' own inputs_embeds and cache, and exact under padding, mixing and generation."""
import pytest
import torch
from tiny import EXACT, FALCONS, LOOSER, difference, fill, ids, tiny
from torch.nn import functional as F
from transformers import DynamicCache

from tsugiki.adapters import attach
from tsugiki.errors import UserError
from tsugiki.methods import LoRA, Prefix, Prompt
from tsugiki.route import token_keys
from tsugiki.sites import FAMILIES

F64 = torch.float64
CASES = [(k, {}) for k in FAMILIES if k != "falcon"] + [("falcon", v) for v in FALCONS.values()] + [("phi", {"qk_layernorm": True})]
NAMES = [k for k in FAMILIES if k != "falcon"] + [f"falcon-{k}" for k in FALCONS] + ["phi-qk_norm"]
family = pytest.mark.parametrize("kind, overrides", CASES, ids=NAMES)


def built(kind, *cfgs, **overrides):
    model = tiny(kind, F64, **overrides)
    adapters = attach(model)
    for i, cfg in enumerate(cfgs):
        fill(adapters.add(f"{cfg.name}{i or ''}", cfg), seed=i + 1, scale=0.3)
    return model, adapters


@family
def test_a_prompt_equals_its_embeddings_put_before_the_text(kind, overrides):
    model, adapters = built(kind, Prompt(tokens=4), **overrides)
    x = ids(2)
    tokens = next(iter(adapters.get("prompt").parameters().values()))
    with adapters.use(None), torch.no_grad():         # LayerNorms, gemma's scale and all else see the same embeddings
        words = model.get_submodule(FAMILIES[kind].embed)(x)
        right = model(inputs_embeds=torch.cat([tokens.expand(2, -1, -1), words], 1)).logits[:, 4:]
        base = model(x).logits
    with torch.no_grad():
        assert difference(model(x).logits, right) <= LOOSER.get(kind, EXACT)
        assert difference(model(inputs_embeds=words).logits, right) <= LOOSER.get(kind, EXACT)
    assert difference(right, base) > 1e-3


@family
def test_a_prefix_equals_the_same_keys_and_values_in_the_cache(kind, overrides):
    """The reference puts raw keys and values into a cache, as PEFT does, and runs the text after it."""
    model, adapters = built(kind, Prefix(tokens=4), **overrides)
    x, cache = ids(2), DynamicCache()
    edits = list(adapters.get("prefix").edits.values())
    for n, ((site, key), (_, value)) in enumerate(zip(edits[::2], edits[1::2], strict=True)):
        heads = [e.tokens.detach().unflatten(-1, (-1, site.head_dim)).transpose(0, 1).expand(2, -1, -1, -1) for e in (key, value)]
        if site.repeated:
            heads = [h.repeat_interleave(4 // h.shape[1], 1) for h in heads]
        cache.update(*heads, n)
    positions = {"position_ids": torch.arange(4, 14)[None]} if "position_ids" in adapters.arguments else {}
    with torch.no_grad():
        with adapters.use(None):
            right = model(x, past_key_values=cache, attention_mask=torch.ones(2, 14, dtype=torch.long), **positions).logits
            base = model(x).logits
        assert difference(model(x).logits, right) <= LOOSER.get(kind, EXACT)
        assert difference(right, base) > 1e-3


@family
def test_prompts_and_prefixes_of_different_lengths_mix_with_padding_and_generate(kind, overrides):
    """Each row alone without padding, against one left-padded batch: logits where there is text, and greedy tokens."""
    model, adapters = built(kind, Prompt(tokens=5), Prefix(tokens=2), LoRA(rank=4), Prefix(tokens=7), **overrides)
    who = ["prompt", "prefix1", "lora2", None, "prefix3", ("prefix1", "lora2"), ("lora2", "prompt")]
    rows = [ids(1, 4 + i % 4, seed=i)[0] for i in range(len(who))]
    x = torch.stack([F.pad(r, (7 - len(r), 0)) for r in rows])
    mask = torch.stack([F.pad(torch.ones_like(r), (7 - len(r), 0)) for r in rows])
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if "position_ids" in adapters.arguments else {}
    with torch.no_grad():
        together = model(x, attention_mask=mask, adapter_ids=who, **positions).logits
    assert together.shape[1] == 7
    made = {c: model.generate(input_ids=x, attention_mask=mask, adapter_ids=who, max_new_tokens=5, do_sample=False, use_cache=c)
            for c in (True, False)}
    assert torch.equal(made[True], made[False])
    for i, (row, name) in enumerate(zip(rows, who, strict=True)):
        with torch.no_grad():
            alone = model(row[None], adapter_ids=[name]).logits[0]
        assert difference(together[i, 7 - len(row):], alone) <= LOOSER.get(kind, EXACT), name
        tokens = model.generate(input_ids=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long),
                                adapter_ids=[name], max_new_tokens=5, do_sample=False)[0, len(row):]
        assert torch.equal(made[True][i, 7:7 + len(tokens)], tokens), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom"])
def test_loss_and_outputs_are_those_of_the_real_tokens(kind):
    model, adapters = built(kind, Prompt(tokens=5), Prefix(tokens=3))
    x = ids(2)
    out = model(x, labels=x, adapter_ids=["prompt", "prefix1"], output_hidden_states=True)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert abs(float(out.loss - loss)) <= 1e-6        # transformers' loss is float32
    assert {h.shape[1] for h in out.hidden_states} == {10}
    assert difference(model(x, adapter_ids=["prompt", "prefix1"], logits_to_keep=4).logits, out.logits[:, -4:]) <= EXACT
    some = torch.tensor([2, 5])
    assert difference(model(x, adapter_ids=["prompt", "prefix1"], logits_to_keep=some).logits, out.logits[:, some]) <= EXACT
    assert difference(model(x, adapter_ids=["prompt", "prefix1"], return_dict=False)[0], out.logits) == 0
    attention = tiny(kind, F64, attn="eager")
    fill(attach(attention).add("p", Prefix(tokens=3)))
    weights = attention(x, output_attentions=True).attentions
    assert {tuple(w.shape[2:]) for w in weights} == {(10, 13)}


def test_keys_of_dropout_follow_the_token_beside_a_prompt():
    model, adapters = built("llama", Prompt(tokens=4), LoRA(dropout=0.4))
    x = ids(2)
    keys = token_keys(0, 0, torch.arange(2)[:, None].expand(2, 10), torch.arange(10).expand(2, 10))
    together = model(x, adapter_ids=[("prompt", "lora1"), "lora1"], token_keys=keys).logits
    for i, row in enumerate((("prompt", "lora1"), "lora1")):
        alone = model(x[i:i + 1], adapter_ids=row, token_keys=keys[i:i + 1]).logits[0]
        assert difference(together[i], alone) <= EXACT


def test_a_rope_that_scales_keys_still_sees_the_raw_prefix():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model, adapters = built("llama", Prefix(tokens=3), rope_parameters=rope)
    assert model.model.rotary_emb.attention_scaling > 1.05
    cache = model(ids(1), use_cache=True).past_key_values
    key = next(iter(adapters.get("prefix").parameters().values()))
    stored = cache.layers[0].keys[0, :, :3].transpose(0, 1).flatten(1)
    assert difference(stored, key) < 1e-6             # cos is float32


def test_virtual_tokens_are_refused_where_they_would_be_wrong():
    model, adapters = built("llama", Prompt(tokens=4), Prefix(tokens=3))
    x = ids(1)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    for call, says in ((dict(position_ids=packed), "packed rows: the forward got position_ids that start again"),
                       (dict(attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.bool)), "packed rows"),
                       (dict(cu_seq_lens_q=torch.tensor([0, 4, 10])), "cu_seq_lens_q"),
                       (dict(adapter_ids=[("prompt", "prefix1")]), "one adapter, not of 2")):
        with pytest.raises(UserError, match=says):
            model(x, **call)
        model(x, **{"adapter_ids": ()} | {k: v for k, v in call.items() if k == "position_ids"})    # the base still can
    with pytest.raises(UserError, match="needs the whole sequence: call the model itself"):
        model.model(x)
    with pytest.raises(UserError, match="needs the whole model's forward"):
        with adapters.use("prefix1"):
            model.model.layers[0].self_attn.v_proj(torch.zeros(1, 2, 64, dtype=F64))

"""What leaves: a merged or fully trained folder is plain transformers and equal to the live model, or is not there at all."""
import json

import pytest
import torch
from kit import CASES, PAD, TOKENIZER, config, go, lines, llama, write
from safetensors.torch import load_file
from tiny import difference, fill, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsugiki import formats
from tsugiki.adapters import attach
from tsugiki.data import Renderer, load_conversations
from tsugiki.edit import Edit
from tsugiki.errors import RunError, UserError
from tsugiki.evaluate.answers import generate_answers
from tsugiki.formats.export import export_model, merge_to_folder
from tsugiki.methods import BitFit, Full, LoRA

WEIGHTS = [n for n, c in CASES.items() if c.parts and all(part.edit.merge is not Edit.merge for part in c.parts)]


def probe(model):
    ids = torch.arange(40).view(2, 20) + 20
    with torch.no_grad():
        return model(ids).logits


def reloaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("kind, name", [(k, n) for k in ("llama", "gpt2", "phi3", "qwen3") for n in WEIGHTS
                                        if n != "bitfit" or k in ("llama", "gpt2")])      # the others' folders hold no biases
def test_a_merged_folder_is_the_live_model_and_the_live_model_is_as_before(kind, name, tmp_path):
    model = llama(kind=kind, **({"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}))
    adapters = attach(model)
    fill(adapters.add("a", CASES[name]), scale=0.05)
    live, before = probe(model), {k: v.clone() for k, v in model.state_dict().items()}
    report = merge_to_folder(model, TOKENIZER, adapters, ["a"], tmp_path / "m", dtype=torch.float32, stop_ids=[2, 5])
    assert difference(probe(reloaded(tmp_path / "m")), live) < 1e-5 and report["relative_error"] < 1e-4
    with adapters.use(None):
        assert difference(live, probe(model)) > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(probe(model), live)
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("one two")["input_ids"] == TOKENIZER("one two")["input_ids"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_two_adapters_merge_into_one_folder(tmp_path):
    model = llama()
    adapters = attach(model)
    fill(adapters.add("a", LoRA(rank=4)), seed=1, scale=0.05)
    fill(adapters.add("b", LoRA(rank=2, targets=("q", "down"))), seed=2, scale=0.05)
    with adapters.use(("a", "b")):
        live = probe(model)
    merge_to_folder(model, TOKENIZER, adapters, ["a", "b"], tmp_path / "m", dtype=torch.float32)
    assert difference(probe(reloaded(tmp_path / "m")), live) < 1e-5 and adapters.merged == ()


def test_above_the_limit_nothing_is_kept(tmp_path):
    model = llama()
    adapters = attach(model)
    fill(adapters.add("a", LoRA(rank=4)), scale=1e-4)  # far below what bfloat16 keeps of these weights
    live = probe(model)
    with pytest.raises(RunError, match=r"bfloat16 .* of the adapter's effect \(limit 10%\), nothing was kept"):
        merge_to_folder(model, TOKENIZER, adapters, ["a"], tmp_path / "m", dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == [] and torch.equal(probe(model), live) and adapters.merged == ()
    report = merge_to_folder(model, TOKENIZER, adapters, ["a"], tmp_path / "m", dtype=torch.bfloat16, limit=1e9)
    assert report["relative_error"] > 0.1 and report["weight_error"] > 0.1 and (tmp_path / "m" / "config.json").is_file()


def test_what_is_no_change_of_weights_and_what_the_folder_cannot_hold_is_refused(tmp_path):
    model = llama(kind="qwen2")
    adapters = attach(model)
    fill(adapters.add("p", CASES["prompt"]))
    fill(adapters.add("b", BitFit(targets=("down",))))
    for name, reason in (("p", "not a change of weights"), ("b", "a bias, which a Qwen2ForCausalLM folder cannot hold")):
        with pytest.raises(UserError, match=reason):
            merge_to_folder(model, TOKENIZER, adapters, [name], tmp_path / "m", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == [] and adapters.merged == ()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for make in (lambda: merge_to_folder(model, TOKENIZER, adapters, ["p"], tmp_path / "full", dtype=torch.float32),
                 lambda: export_model(model, TOKENIZER, tmp_path / "full", dtype=torch.float32)):
        with pytest.raises(UserError, match="full: is there"):
            make()
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_a_tied_head_merges_into_a_folder_with_a_head_of_its_own(kind, dtype, tmp_path):
    model = llama(kind=kind, tie_word_embeddings=True)
    adapters = attach(model)
    fill(adapters.add("a", LoRA(rank=4, targets=("head",))), scale=0.3)
    live = probe(model)
    merge_to_folder(model, TOKENIZER, adapters, ["a"], tmp_path / "m", dtype=dtype)
    again = reloaded(tmp_path / "m")
    assert difference(probe(again), live) < (1e-4 if dtype == torch.float32 else 0.5) and float(live.abs().max()) > 10
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert model.lm_head.weight is model.get_input_embeddings().weight and torch.equal(probe(model), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_stored_once(dtype, tmp_path):
    model = llama(tie_word_embeddings=True)
    export_model(model, TOKENIZER, tmp_path / "m", dtype=dtype)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert "lm_head.weight" not in stored and {t.dtype for t in stored.values()} == {dtype}
    again = reloaded(tmp_path / "m")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(probe(again), probe(model)) or dtype == torch.bfloat16


@pytest.mark.parametrize("method", [Full(), Full(last=1), Full(params="norm")])
def test_full_fine_tuning_leaves_a_folder_of_the_trained_weights(method, tmp_path):
    model = llama()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    result = go(config(tmp_path / "run", method, held=True, steps=4), model)
    again = reloaded(result.saved).state_dict()
    assert result.saved.name == "model" and all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
    changed = {k for k, v in base.items() if not torch.equal(v, again[k])}
    assert changed == set(method.select(llama())), "other weights than the chosen ones moved, or some did not"
    assert json.loads((result.saved / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_a_base_stored_in_bfloat16_gives_a_folder_in_bfloat16_rounded_once(tmp_path):
    base = tmp_path / "base"
    export_model(llama(), TOKENIZER, base, dtype=torch.bfloat16)
    model = reloaded(base)
    cfg = config(tmp_path / "run", "full", steps=3)
    cfg = type(cfg)(**{**vars(cfg), "base": str(base)})
    result = go(cfg, model)
    stored = load_file(result.saved / "model.safetensors")
    assert all(torch.equal(t, model.state_dict()[k].bfloat16()) for k, t in stored.items())
    assert json.loads((result.saved / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapters_manifest_says_how_it_was_trained(tmp_path):
    result = go(config(tmp_path / "run", "lora", steps=2))
    manifest = formats.read_manifest(result.saved)
    assert manifest["stop_ids"] == [2] and manifest["extra"]["kind"] == "plain" and manifest["method"] == "lora"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stop_token_and_template_of_the_data_are_kept_with_the_result(method, tmp_path):
    chat = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": w["prompt"]},
                                                         {"role": "assistant", "content": w["completion"]}]} for w in lines(8)])
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] }}"
                        "{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
                        "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}")
    cfg = config(tmp_path / "run", method, steps=2)
    data = {**vars(cfg.data), "files": [str(chat)], "template": str(template), "stop": "<|im_end|>"}
    cfg = type(cfg)(**{**vars(cfg), "data": type(cfg.data)(**data)})
    model = llama()
    result = go(cfg, model)
    stop = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    if method == "lora":
        manifest = formats.read_manifest(result.saved)
        assert stop in manifest["stop_ids"]
        assert manifest["extra"] == {"kind": "chat", "template": template.read_text(), "stop": "<|im_end|>"}
        return
    tokenizer = AutoTokenizer.from_pretrained(result.saved)
    assert tokenizer.chat_template == template.read_text() and TOKENIZER.chat_template is None
    assert stop in json.loads((result.saved / "generation_config.json").read_text())["eos_token_id"]
    rows = load_conversations([chat])
    want = generate_answers(model, Renderer(TOKENIZER, template=template.read_text(), stop="<|im_end|>"), rows, 4, 4, PAD)
    assert generate_answers(reloaded(result.saved), Renderer(tokenizer), rows, 4, 4, PAD) == want


def test_an_export_that_was_killed_leaves_nothing_behind_in_the_next(tmp_path):
    (tmp_path / ".m.new").mkdir()
    (tmp_path / ".m.new" / "model.safetensors").write_bytes(b"half")
    export_model(llama(), TOKENIZER, tmp_path / "m", dtype=torch.float32)
    export_model(llama(), TOKENIZER, tmp_path / "m", dtype=torch.bfloat16)        # a model folder is replaced
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_model_of_fewer_positions_than_the_probe_merges(tmp_path):
    model = tiny("gpt2", n_positions=16)
    adapters = attach(model)
    fill(adapters.add("a", LoRA(rank=2)))
    assert merge_to_folder(model, None, adapters, ["a"], tmp_path / "m", dtype=torch.float32)["relative_error"] < 1e-4

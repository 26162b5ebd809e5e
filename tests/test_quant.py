"""Bases in 4 and 8 bits: every method computes there what it computes on the dequantised weights, and moves to 16 bits and back."""
import copy
import json
import shutil
import sys
import threading

import pytest
import torch
from kit import TOKENIZER, config, go, lines, metrics, result_bits, write
from tiny import METHOD_CASES, SPECS, attached, difference, fill, ids, tiny
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tsugiki as tg
from tsugiki import formats
from tsugiki.adapters import attach
from tsugiki.cli.main import main
from tsugiki.edit import Edit
from tsugiki.errors import UserError
from tsugiki.formats.export import merge_to_folder
from tsugiki.methods import Full
from tsugiki.weights import dense, dims, few_bits, numel, transposed
from tsugiki.weights import write as put

pytest.importorskip("bitsandbytes")
# Both sides multiply by the same float32 matrix; only the order of float32 sums may differ between two shapes of batch.
CLOSE = 2e-5
PROMPT = (torch.arange(12) < 4).expand(3, -1)           # some methods change only tokens of a prompt
WIDTHS = (4, 8)
KINDS = ("llama", "gpt2")
MERGEABLE = [n for n, c in METHOD_CASES.items() if all(part.edit.merge is not Edit.merge for part in c.parts)]
widths, kinds = pytest.mark.parametrize("bits", WIDTHS), pytest.mark.parametrize("kind", KINDS)
names = pytest.mark.parametrize("name", METHOD_CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: the folder of a tiny model of a family, written once."""
    root = tmp_path_factory.mktemp("bases")

    def of(kind, **more):
        path = root / "-".join([kind, *map(str, more.values())])
        if not path.exists():
            tiny(kind, **{"vocab_size": max(200, len(TOKENIZER))} | more).save_pretrained(path)
            TOKENIZER.save_pretrained(path)
        return str(path)
    return of


def in_bits(path, bits, dtype="fp32"):
    return tg.load(path, bits=bits, dtype=dtype, device="cpu")[0]


def dequantised(model, path):
    """A plain model with the weights that `model` computes with."""
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and few_bits(module):
            put(plain.get_submodule(name), dense(module).float(), module.bias)
    return plain


def bits_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def grown(model, name):
    """Losses and gradients of one adapter over one batch, after a forward without gradients (which must not matter)."""
    x = ids(3, 12)
    with torch.no_grad():
        model(x, adapter_ids=name)
    model(x, labels=x, prompt_mask=PROMPT, adapter_ids=name, use_cache=False).loss.backward()
    found = {n: p.grad.clone() for n, p in model.adapters.get(name).parameters().items() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


@widths
@pytest.mark.parametrize("kind", SPECS)
def test_each_linear_in_few_bits_is_near_its_original_and_lies_the_same_way(kind, bits, folder):
    path = folder(kind)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if kind == "falcon":                              # its linears are a class of their own, which transformers leaves alone
        with pytest.raises(UserError, match="none of its linears is of a kind that bitsandbytes replaces"):
            in_bits(path, bits)
        return
    model = in_bits(path, bits)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and few_bits(m)}
    assert len(found) >= 8 and few_bits(model) == bits and few_bits(plain) is None
    for name, module in found.items():
        before, now = dense(plain.get_submodule(name)).detach(), dense(module)
        assert transposed(module) == transposed(plain.get_submodule(name)) and dims(module) == dims(plain.get_submodule(name))
        assert now.shape == before.shape and now.is_floating_point() and numel(module.weight) == before.numel()
        share = float((now - before).norm() / before.norm())          # NF4 of normal numbers loses 9 %, int8 of a row under 1 %
        assert (0.02 < share < 0.15) if bits == 4 else (1e-4 < share < 0.02), name
    assert few_bits(model.get_input_embeddings()) is None and few_bits(model.get_output_embeddings()) is None


@pytest.mark.share(3)
@widths
@pytest.mark.parametrize("kind", [k for k in SPECS if k != "falcon"])
def test_every_family_computes_with_the_dequantised_weights_and_every_adapter_sits_on_it(kind, bits, folder):
    model = in_bits(folder(kind), bits)
    plain = dequantised(model, folder(kind))
    attached(model), attached(plain)
    who = [*METHOD_CASES, None]
    x = ids(len(who))
    with torch.no_grad():
        mixed = model(x, adapter_ids=who).logits
        assert difference(mixed, plain(x, adapter_ids=who).logits) < CLOSE * (50 if kind == "gptj" else 1)
        assert difference(mixed[:-1], model(x, adapter_ids=()).logits[:-1]) > 1e-3


@pytest.mark.share(5)
@widths
@kinds
@names
def test_an_adapter_trains_as_on_the_dequantised_weights_and_no_base_bit_changes(name, kind, bits, folder):
    model = in_bits(folder(kind), bits)
    plain = dequantised(model, folder(kind))
    adapters, others = attached(model, name), attached(plain, name)
    before, keys = bits_of(model), list(model.state_dict())
    found, right = grown(model, name), grown(plain, name)
    assert found.keys() == right.keys() == adapters.get(name).parameters().keys()
    for key in right:
        assert difference(found[key], right[key]) <= 1e-4 * float(right[key].abs().max()) + 1e-7, key
    assert all(float(g.abs().max()) > 0 for g in right.values())
    model.gradient_checkpointing_enable()
    model.train()
    again = grown(model, name)
    assert all(difference(again[k], right[k]) <= 1e-4 * float(right[k].abs().max()) + 1e-7 for k in right)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    start = [p.detach().clone() for p in adapters.parameters()]
    x = ids(3, 12)
    losses = []
    for _ in range(4):
        loss = model(x, labels=x, prompt_mask=PROMPT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and not any(torch.equal(a, b) for a, b in zip(start, adapters.parameters(), strict=True))
    assert same(bits_of(model), before) and list(model.state_dict()) == keys
    assert {p.dtype for p in adapters.parameters()} == {torch.float32} and others.names() == adapters.names()


@widths
@kinds
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_mixed_batch_is_each_row_alone_also_when_generating(kind, bits, dtype, folder):
    model = in_bits(folder(kind), bits, dtype)
    attached(model)
    who = [*METHOD_CASES, None]
    x = ids(len(who))
    with torch.no_grad():
        mixed = model(x, adapter_ids=who).logits
        assert mixed.dtype == model.dtype
        for i, name in enumerate(who):
            alone = model(x[i:i + 1], adapter_ids=[name]).logits
            assert difference(alone, mixed[i:i + 1]) < (CLOSE if dtype == "fp32" else 0.05), name      # bf16 has 8 bits
    if dtype == "fp32":
        told = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        many = model.generate(x, adapter_ids=who, **told)
        for i, name in enumerate(who):
            assert torch.equal(model.generate(x[i:i + 1], adapter_ids=[name], **told)[0], many[i]), name


@widths
def test_a_rows_result_depends_neither_on_its_neighbours_nor_on_the_mode(bits, folder):
    linear = in_bits(folder("llama"), bits).model.layers[0].mlp.up_proj
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, :8] = 60.0                                # bitsandbytes' own 8-bit forward treats such features apart, in all rows
    with torch.no_grad():
        whole = linear.eval()(x)
        assert difference(linear(x[1:]), whole[1:]) < CLOSE and difference(linear.train()(x), whole) < CLOSE
        assert difference(whole, x @ dense(linear).float().T) < CLOSE * 60


@widths
def test_a_model_that_transformers_itself_loaded_is_made_exact_by_attaching(bits, folder):
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32, quantization_config=options,
                                                 device_map={"": "cpu"}).eval()
    plain = dequantised(model, folder("llama"))
    attached(model, "lora"), attached(plain, "lora")
    found, right = grown(model, "lora"), grown(plain, "lora")
    assert all(difference(found[k], right[k]) <= 1e-4 * float(right[k].abs().max()) for k in right)


def test_a_model_that_was_repacked_before_is_refused_and_one_line_says_what_to_do(folder):
    model = in_bits(folder("llama"), 4)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="4-bit weights were repacked for inference .* load it anew"):
        attach(model)
    assert not hasattr(model, "adapters")


@widths
def test_two_threads_may_make_the_first_forward_at_once(bits, folder):
    model = in_bits(folder("llama"), bits)
    x, found = ids(2), {}
    gate = threading.Barrier(4)

    def work(i):
        gate.wait()
        with torch.no_grad():
            found[i] = model(x).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 and all(torch.equal(found[i], model(x).logits) for i in found)


@widths
@kinds
def test_a_deep_copy_and_a_folder_of_it_compute_the_same(kind, bits, folder, tmp_path):
    model = in_bits(folder(kind), bits)
    adapters = attached(model, "lora")
    x = ids(2)
    with torch.no_grad():
        right, base = model(x).logits, model(x, adapter_ids=()).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x).logits, right)
        for p in twin.adapters.parameters():
            p.zero_()
        assert torch.equal(twin(x).logits, base) and torch.equal(model(x).logits, right)
        model.save_pretrained(tmp_path / "few")
        TOKENIZER.save_pretrained(tmp_path / "few")
        again, _ = tg.load(str(tmp_path / "few"), dtype="fp32", device="cpu")
        assert few_bits(again) == bits and difference(again(x).logits, base) < CLOSE
    with pytest.raises(UserError, match=f"cannot be loaded in {12 - bits} bits"):
        tg.load(str(tmp_path / "few"), bits=12 - bits, dtype="fp32", device="cpu")
    assert adapters.names() == ("lora",)


@widths
@kinds
@pytest.mark.parametrize("name", MERGEABLE)
def test_a_merge_into_few_bits_is_refused_and_changes_nothing(name, kind, bits, folder):
    """A method that changes only what is not in few bits (norms) merges there as anywhere."""
    model = in_bits(folder(kind), bits)
    adapters = attached(model, name)
    before, x = bits_of(model), ids(2)
    with torch.no_grad():
        right = model(x).logits
        if not any(few_bits(site.exit) for site in adapters.get(name).sites):
            adapters.merge(name)
            assert not same(bits_of(model), before) and difference(model(x).logits, right) < CLOSE
            adapters.unmerge(name)
            assert same(bits_of(model), before)
            return
        with pytest.raises(UserError, match=f"the base is in {bits} bits.* merge into the original 16-bit weights"):
            adapters.merge(name)
        assert adapters.merged == () and same(bits_of(model), before) and torch.equal(model(x).logits, right)
    with pytest.raises(UserError, match="cannot take a merge"):
        put(model.get_submodule(adapters.get(name).edits[next(iter(adapters.get(name).edits))][0].module), torch.zeros(1), None)


@pytest.mark.share(5)
@widths
@kinds
@names
def test_an_adapter_moves_from_few_bits_to_sixteen_and_back_and_merges_there(name, kind, bits, folder, tmp_path):
    path = folder(kind)
    few, plain = in_bits(path, bits), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    adapter = fill(attach(few).add("a", METHOD_CASES[name]))
    formats.save(adapter, tmp_path / "few")
    there = attach(plain).load("a", tmp_path / "few")
    formats.save(there, tmp_path / "plain")
    back = attach(few).load("b", tmp_path / "plain")
    cfg, tensors = adapter.cfg.stored(adapter)        # a method may write less than it trains
    for other in (there, back):
        again = other.cfg.stored(other)
        assert again[0] == cfg == other.cfg and same(again[1], tensors) and tensors
    manifests = [formats.read_manifest(tmp_path / n) for n in ("few", "plain")]
    assert manifests[0]["base"] is None and manifests[1]["base"] and manifests[0]["base_rest"] == manifests[1]["base_rest"]
    if name in MERGEABLE:
        report = merge_to_folder(plain, None, attach(plain), ["a"], tmp_path / "merged", dtype=torch.float32)
        assert report["relative_error"] < 1e-3
    other = folder(kind, initializer_range=0.05)
    foreign = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    for model, saved in ((foreign, "few"), (foreign, "plain"), (in_bits(other, bits), "few"), (in_bits(other, bits), "plain")):
        with pytest.raises(UserError, match="made on another base"):
            attach(model).load("a", tmp_path / saved)


def test_a_manifest_from_before_few_bits_loads_on_sixteen_and_is_refused_in_one_line_on_few(folder, tmp_path):
    path = folder("llama")
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    formats.save(fill(attach(plain).add("a", METHOD_CASES["lora"])), tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "MANIFEST.json").read_text())
    del manifest["base_rest"]
    manifest["self"] = formats._self_hash(manifest)
    (tmp_path / "old" / "MANIFEST.json").write_text(json.dumps(manifest))
    attach(plain).load("again", tmp_path / "old")
    few = attach(in_bits(path, 4))
    with pytest.raises(UserError, match="base_rest: is missing, .* save it again, or pass check_base=False"):
        few.load("a", tmp_path / "old")
    few.load("a", tmp_path / "old", check_base=False)


@widths
def test_a_run_that_went_on_ends_with_the_same_bits(bits, folder, tmp_path):
    whole = result_bits(go(config(tmp_path / "whole", steps=6, held=True, eval_steps=2), in_bits(folder("llama"), bits)))
    go(config(tmp_path / "part", steps=6, held=True, eval_steps=2), in_bits(folder("llama"), bits))
    for step in range(4, 7):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{step:08d}")
    said = []
    again = go(config(tmp_path / "part", steps=6, held=True, eval_steps=2), in_bits(folder("llama"), bits), said.append)
    assert same(result_bits(again), whole) and "going on from step 3 of 6" in said
    assert any(f"base in {bits} bits" in line for line in said)


def test_full_fine_tuning_of_few_bits_is_refused_before_anything_is_loaded(folder, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", lines())
    assert main(["train", "--base", str(tmp_path), "--bits", "4", "--method", "full", "--data", str(rows), "--out", "x"]) == 2
    assert "bits: weights in 4 bits cannot be trained; give another method than full" in capsys.readouterr().err
    model = in_bits(folder("llama"), 4)
    with pytest.raises(UserError, match="method.name: weights in 4 bits cannot be trained"):
        go(config(tmp_path / "run", Full()), model)


@pytest.mark.parametrize("options, message", [
    ({"bits": 3}, "bits: 3 is not one of 4, 8"), ({"bits": 4, "dtype": "fp64"}, "bits: 4 computes in bf16 or fp32, not in fp64")])
def test_what_few_bits_cannot_be_is_one_line(options, message, folder):
    with pytest.raises(UserError, match=message):
        tg.load(folder("llama"), device="cpu", **options)


@pytest.mark.parametrize("library", ["bitsandbytes", "accelerate"])
def test_without_the_library_one_line_says_what_to_install(library, folder, monkeypatch):
    monkeypatch.setattr(sys.modules["tsugiki.load"], "find_spec", lambda name: None if name == library else object())
    with pytest.raises(UserError, match=rf"bits: 4 needs {library}, which is not installed; pip install 'tsugiki\[quant\]'"):
        tg.load(folder("llama"), bits=4, device="cpu")


def test_the_command_line_trains_scores_answers_and_merges_over_a_base_in_4_bits(tmp_path, capsys):
    base, rows, out = "embedded", write(tmp_path / "rows.jsonl", lines()), tmp_path / "run"
    train = ["train", "--base", base, "--bits", "4", "--data", str(rows), "--out", str(out), "--steps", "12", "--lr", "5e-3",
             "--batch-size", "8", "--dtype", "fp32", "--set", "train.log_steps=1", "--json", "--quiet"]
    assert main(train) == 0
    found, losses = json.loads(capsys.readouterr().out), [line["loss"] for line in metrics(out) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert found["total"] - found["trainable"] == sum(p.numel() for p in tg.load(base, device="cpu")[0].parameters())
    adapter = ["--base", base, "--adapter", str(out / "adapter"), "--json", "--quiet", "--dtype", "fp32"]
    scores = {}
    for width in ("0", "4", "8"):
        assert main(["eval", *adapter, "--bits", width, "--data", str(rows), "--metric", "loss"]) == 0
        scores[width] = json.loads(capsys.readouterr().out)["loss"]
    assert all(abs(scores[w] - scores["0"]) < 0.3 for w in ("4", "8")) and len(set(scores.values())) == 3
    assert main(["generate", *adapter, "--bits", "4", "--prompt", "one and 1 is", "--max-new-tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"]
    assert main(["merge", *adapter, "--out", str(tmp_path / "merged")]) == 0
    assert json.loads(capsys.readouterr().out)["relative_error"] < 1e-3
    assert few_bits(tg.load(str(tmp_path / "merged"), device="cpu")[0]) is None
    assert main(train[:3] + ["--bits", "8"] + train[5:]) == 2         # another base is another run
    assert "bits is 4 there, 8 here" in capsys.readouterr().err

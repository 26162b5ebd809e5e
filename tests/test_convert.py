"""Converting keeps the numbers: loralib's checkpoints act in PEFT as in loralib, and an adapter's two forms are one adapter."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from kit import TOKENIZER, llama
from peft import PeftModel
from safetensors.torch import load_file
from tiny import EXACT, difference, fill, ids, tiny
from tokenizers_tiny import data_dir
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForSequenceClassification

from tsugiki import formats
from tsugiki.adapters import attach
from tsugiki.cli.main import main
from tsugiki.errors import RunError, UserError
from tsugiki.formats.export import export_model
from tsugiki.formats.forms import convert as convert_form
from tsugiki.formats.loralib import convert
from tsugiki.methods import OFT, LoRA, LoReFT, Prefix, Prompt

F64 = torch.float64
CLOSE = 1e-5                                          # float32: PEFT orders its sums otherwise


@pytest.fixture
def call(capsys):
    """Run `tsugiki convert`: (exit code, stdout, stderr)."""
    def run(*argv):
        capsys.readouterr()
        code = main(["convert", *map(str, argv)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err
    return run


def checkpoint(path, tensors: dict):
    torch.save(tensors, path)
    return path


def pair(module: str, r: int, d_in: int, d_out: int, parts: int = 1, dtype=torch.float32, seed: int = 0) -> dict:
    """What loralib saves of a Linear, or of a MergedLinear with `parts` trained parts of width d_out."""
    g = torch.Generator().manual_seed(seed)
    return {f"{module}.lora_A": torch.randn(r * parts, d_in, generator=g, dtype=F64).to(dtype),
            f"{module}.lora_B": torch.randn(d_out * parts, r, generator=g, dtype=F64).to(dtype)}


def loralib_change(a, b, alpha: float, enabled: list[bool]):
    """loralib's MergedLinear: a grouped convolution of B over A, its rows put where the trained parts lie, times alpha / r."""
    delta = F.conv1d(a[None], b[:, :, None], groups=sum(enabled))[0]
    change = delta.new_zeros(len(enabled), delta.shape[0] // sum(enabled), delta.shape[1])
    change[torch.tensor(enabled)] = delta.view(sum(enabled), -1, delta.shape[1])
    return change.flatten(0, 1) * (alpha / b.shape[1])


def logits(model, x, **more):
    with torch.no_grad():
        return model(input_ids=x, **more).logits


# loralib

def test_the_real_checkpoint_acts_in_peft_by_the_formula(tmp_path, call):
    file = data_dir("loralib", "roberta_base_lora_mnli.bin")
    code, out, err = call("--adapter", file, "--from", "loralib", "--alpha", 16, "--leave-out", "^classifier",
                          "--out", tmp_path / "o", "--base", "roberta-base", "--json")
    report = json.loads(out)
    assert code == 0 and len(report["modules"]) == 24 and report["ranks"] == [8]
    assert report["left_out"] == [f"classifier.{m}.{k}" for m in ("dense", "out_proj") for k in ("weight", "bias")]
    theirs = torch.load(file, weights_only=True, map_location="cpu")
    torch.manual_seed(0)                              # roberta-base's shapes, few words
    config = RobertaConfig(vocab_size=300, max_position_embeddings=64, type_vocab_size=1, num_labels=3, hidden_dropout_prob=0.0)
    base = RobertaForSequenceClassification(config).eval()
    x = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    before = logits(base, x)
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, str(tmp_path / "o")).eval()
    seen = {}
    module = model.base_model.model.roberta.encoder.layer[5].attention.self.value
    module.register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y, base=m.base_layer(args[0])))
    after = logits(model, x)
    a, b = (theirs[f"roberta.encoder.layer.5.attention.self.value.lora_{n}"] for n in "AB")
    change = 16 / 8 * seen["x"] @ a.T @ b.T
    assert difference(seen["y"], seen["base"] + change) < CLOSE < 1e-3 < float(change.abs().max())
    plain = RobertaForSequenceClassification(config).eval()
    for name in [k.removesuffix(".lora_A") for k in theirs if k.endswith(".lora_A")]:
        state[f"{name}.weight"] += 16 / 8 * theirs[f"{name}.lora_B"] @ theirs[f"{name}.lora_A"]
    plain.load_state_dict(state)
    assert difference(after, logits(plain, x)) < CLOSE < 1e-3 < difference(after, before)


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True, False], [False, True, True]],
                         ids=lambda e: "".join("01"[x] for x in e))
def test_a_merged_linear_becomes_the_same_change_as_one_lora(enabled, tmp_path):
    """GPT-2's c_attn, in float64 on our side and float32 on PEFT's, against loralib's own formula."""
    tensors = {}
    for n in range(2):
        tensors |= pair(f"transformer.h.{n}.attn.c_attn", 4, 64, 64, sum(enabled), F64, seed=n)
    convert(checkpoint(tmp_path / "a.pt", {"model_state_dict": tensors}), tmp_path / "o", 32, enable_lora=enabled)
    x, model, expected = ids(2), tiny("gpt2", F64), tiny("gpt2", F64)
    with torch.no_grad():
        for n, block in enumerate(expected.transformer.h):
            a, b = (tensors[f"transformer.h.{n}.attn.c_attn.lora_{k}"] for k in "AB")
            block.attn.c_attn.weight += loralib_change(a, b, 32, enabled).T
    wanted, before = logits(expected, x), logits(model, x)
    adapters = attach(model)
    adapters.load("a", tmp_path / "o")
    assert difference(logits(model, x), wanted) <= EXACT < 1e-2 < difference(before, wanted)
    theirs = PeftModel.from_pretrained(tiny("gpt2", F64), str(tmp_path / "o"), autocast_adapter_dtype=False).eval()
    assert difference(logits(theirs, x), wanted) <= EXACT


def test_ranks_that_differ_and_fused_beside_plain_keep_their_scales_in_peft(tmp_path):
    at = "transformer.h.{}.attn.{}"
    tensors = (pair(at.format(0, "c_attn"), 4, 64, 64, 2, F64) | pair(at.format(0, "c_proj"), 3, 64, 64, 1, F64, 1)
               | pair(at.format(1, "c_proj"), 6, 64, 64, 1, F64, 2))
    convert(checkpoint(tmp_path / "a.pt", tensors), tmp_path / "o", 7, enable_lora=[True, False, True])
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == 2 and list(config["alpha_pattern"].values()) == [14]
    x, expected = ids(2), tiny("gpt2", F64)
    with torch.no_grad():
        for path, enabled in ((at.format(0, "c_attn"), [True, False, True]), (at.format(0, "c_proj"), [True]),
                              (at.format(1, "c_proj"), [True])):
            change = loralib_change(tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"], 7, enabled)
            expected.get_submodule(path).weight += change.T
    theirs = PeftModel.from_pretrained(tiny("gpt2", F64), str(tmp_path / "o"), autocast_adapter_dtype=False).eval()
    assert difference(logits(expected, x), logits(tiny("gpt2", F64), x)) > 1e-2
    assert difference(logits(theirs, x), logits(expected, x)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, F64])
def test_renamed_modules_load_here_with_the_same_bits(dtype, tmp_path, call):
    tensors = {}
    for n in range(2):
        tensors |= pair(f"blocks.{n}.self_attn.q_proj", 2, 64, 64, dtype=dtype, seed=n)
    file = checkpoint(tmp_path / "a.pt", tensors)
    code, out, err = call("--adapter", file, "--from", "loralib", "--alpha", "3.5", "--rename", "blocks.=model.layers.",
                          "--out", tmp_path / "o")
    assert code == 0 and "2 modules of rank 2" in out and not err
    adapter = attach(tiny("llama", F64)).load("a", tmp_path / "o")
    params = adapter.parameters()
    assert adapter.cfg.alpha == 3.5 and len(params) == 4
    for name, p in params.items():
        theirs = tensors[name.replace("model.layers", "blocks").replace(".A", ".lora_A").replace(".B", ".lora_B")]
        assert torch.equal(p, theirs.to(p.dtype)) and theirs.abs().max() > 0
    assert all(t.dtype == dtype for t in load_file(tmp_path / "o" / "adapter_model.safetensors").values())


LINEAR, MERGED = pair("m.0.q_proj", 2, 8, 8), pair("h.0.c_attn", 2, 8, 8, 2)
HEAD = {"classifier.weight": torch.ones(2, 8), "classifier.bias": torch.ones(2)}
REFUSED = {
    "no alpha": (LINEAR, [], "--alpha: missing"), "alpha 0": (LINEAR, ["--alpha", 0], "alpha: must be a number above 0"),
    "alpha nan": (LINEAR, ["--alpha", "nan"], "alpha: must be a number above 0"),
    "a head": (LINEAR | HEAD, ["--alpha", 1], "also holds classifier.weight, classifier.bias"),
    "part of a head": (LINEAR | HEAD, ["--alpha", 1, "--leave-out", "weight$"], "also holds classifier.bias"),
    "left out nothing": (LINEAR, ["--alpha", 1, "--leave-out", "head"], "found in no tensor's name"),
    "left out half": (LINEAR, ["--alpha", 1, "--leave-out", "lora_A"], "has no m.0.q_proj.lora_A"),
    "left out all": (LINEAR, ["--alpha", 1, "--leave-out", "lora"], "no lora_A and lora_B"),
    "no regex": (LINEAR, ["--alpha", 1, "--leave-out", "("], "not a regular expression"),
    "no lora": (HEAD, ["--alpha", 1], "no lora_A and lora_B"),
    "which parts": (MERGED, ["--alpha", 1], "2 trained parts, and the file does not say which"),
    "too many parts": (MERGED, ["--alpha", 1, "--enable-lora", "1,1,1"], "has 2 trained parts"),
    "perhaps one part": (pair("h.0.c_attn", 2, 8, 8), ["--alpha", 1], "perhaps one trained part"),
    "parts of what": (LINEAR, ["--alpha", 1, "--enable-lora", "1,0,1"], "no module's name fits"),
    "fused by another name": (pair("h.0.mix", 2, 8, 8, 2), ["--alpha", 1, "--enable-lora", "1,0,1"], "found in this module's name"),
    "parts unreadable": (MERGED, ["--alpha", 1, "--enable-lora", "q,v"], "--enable-lora q,v: must be"),
    "parts none": (MERGED, ["--alpha", 1, "--enable-lora", "0,0"], "at least one 1"),
    "shapes": (LINEAR | {"m.0.q_proj.lora_B": torch.ones(8, 3)}, ["--alpha", 1], "do not fit"),
    "a vector": (LINEAR | {"m.0.q_proj.lora_B": torch.ones(8)}, ["--alpha", 1], "two matrices"),
    "two types": (LINEAR | {"m.0.q_proj.lora_B": torch.ones(8, 2, dtype=F64)}, ["--alpha", 1], "two matrices"),
    "whole numbers": ({k: v.long() for k, v in LINEAR.items()}, ["--alpha", 1], "two matrices"),
    "not finite": (LINEAR | {"m.0.q_proj.lora_B": torch.full((8, 2), float("nan"))}, ["--alpha", 1], "not finite"),
    "an embedding": (pair("transformer.wte", 2, 8, 8), ["--alpha", 1], "is an embedding"),
    "no module's name": (pair("a/../b", 2, 8, 8), ["--alpha", 1], "not a module's name"),
    "renames nothing": (LINEAR, ["--alpha", 1, "--rename", "x.=y."], "no module's name begins so"),
    "renames into one": (LINEAR | pair("n.0.q_proj", 2, 8, 8), ["--alpha", 1, "--rename", "n.=m."], "both be called m.0.q_proj"),
    "renames away": (LINEAR, ["--alpha", 1, "--rename", "m.0.q_proj="], "not a module's name"),
    "rename unreadable": (LINEAR, ["--alpha", 1, "--rename", "x"], "must be FROM=TO"),
    "to native": (LINEAR, ["--alpha", 1, "--to", "native"], "--to native"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_exactly_is_refused_in_one_line_and_writes_nothing(name, tmp_path, call):
    tensors, flags, words = REFUSED[name]
    code, out, err = call("--adapter", checkpoint(tmp_path / "a.pt", tensors), "--from", "loralib", "--out", tmp_path / "o", *flags)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_plain_linear_by_a_fused_name_converts_when_it_is_said_or_seen(tmp_path):
    wide = pair("h.0.c_attn", 2, 8, 24)               # as wide as q, k and v: no part of it
    for n, (tensors, enabled) in enumerate([(wide, None), (wide, [True]), (pair("h.0.c_attn", 2, 8, 8), [True])]):
        convert(checkpoint(tmp_path / "a.pt", tensors), tmp_path / f"o{n}", 4, enable_lora=enabled)
        found = load_file(tmp_path / f"o{n}" / "adapter_model.safetensors")
        assert torch.equal(found["base_model.model.h.0.c_attn.lora_B.weight"], tensors["h.0.c_attn.lora_B"])


def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path, call):
    (tmp_path / "a.pt").write_bytes(b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch ran\x85R.")
    code, out, err = call("--adapter", tmp_path / "a.pt", "--from", "loralib", "--alpha", 1, "--out", tmp_path / "o")
    assert code == 2 and "a.pt: asks for os.system: refused; nothing was run" in err


def test_what_stands_where_the_new_folder_should_is_kept(tmp_path, call):
    file = checkpoint(tmp_path / "a.pt", LINEAR)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "adapter_config.json").write_text("{}")
    code, out, err = call("--adapter", file, "--from", "loralib", "--alpha", 1, "--out", tmp_path / "o")
    assert code == 2 and "is there already" in err and (tmp_path / "o" / "adapter_config.json").read_text() == "{}"


# The two forms

CASES = {"lora": LoRA(rank=3, alpha=5.0, dropout=0.25), "some": LoRA(rank=2, targets=r"layers\.1\..*q_proj"),
         "prompt": Prompt(tokens=3), "prefix": Prefix(tokens=2)}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_the_same_folder_bit_for_bit(name, tmp_path):
    model = tiny("llama", F64)
    adapters = attach(model)
    adapter, x = fill(adapters.add("a", CASES[name]), seed=3), ids(2)
    formats.save(adapter, tmp_path / "peft", stop_ids=[7], base="org/b", extra={"kind": "chat"})
    before = logits(model, x)
    assert difference(before, logits(model, x, adapter_ids=())) > 1e-3
    report = convert_form(adapters.load("b", tmp_path / "peft"), tmp_path / "peft", tmp_path / "native", "native")
    assert report["form"] == "native" and "peft_type" not in json.loads((tmp_path / "native" / "adapter_config.json").read_text())
    convert_form(adapters.load("c", tmp_path / "native"), tmp_path / "native", tmp_path / "again", "peft", base="org/b")
    for file in ("adapter_model.safetensors", "adapter_config.json", "MANIFEST.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
    adapters.load("d", tmp_path / "again")
    for loaded in "bcd":
        assert torch.equal(logits(model, x, adapter_ids=loaded), before)
    assert adapters.names() == ("a", "b", "c", "d")   # what the check attached is gone


def test_a_folder_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    adapters = attach(tiny("llama", F64))
    formats.save(adapter := fill(adapters.add("a", LoRA(rank=2))), tmp_path / "a")
    written = formats.pack_tensors
    monkeypatch.setattr(formats, "pack_tensors", lambda tensors, path: written({n: t + 1 for n, t in tensors.items()}, path))
    with pytest.raises(RunError, match="does not read back"):
        convert_form(adapter, tmp_path / "a", tmp_path / "o", "native")
    assert not (tmp_path / "o").exists() and adapters.names() == ("a",)


@pytest.mark.parametrize("kind, cfg, words", [("llama", LoReFT(), "PEFT has no form for reft"),
                                              ("gpt2", LoRA(rank=2, targets=("q", "v")), "PEFT cannot name")])
def test_what_peft_does_not_have_is_refused_with_the_reason(kind, cfg, words, tmp_path):
    adapters = attach(tiny(kind, F64))
    formats.save(adapter := fill(adapters.add("a", cfg)), tmp_path / "a")
    with pytest.raises(UserError, match=words):
        convert_form(adapter, tmp_path / "a", tmp_path / "o", "peft")
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(export_model(llama(), TOKENIZER, tmp_path_factory.mktemp("base") / "base", dtype=torch.float32))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    adapters = attach(llama())
    return formats.save(fill(adapters.add("a", LoRA(rank=2))), tmp_path_factory.mktemp("saved") / "a", stop_ids=[5])


def test_the_command_converts_there_and_back(base, saved, tmp_path, call):
    code, out, err = call("--adapter", saved, "--base", base, "--to", "native", "--out", tmp_path / "n", "--json")
    assert code == 0 and json.loads(out)["form"] == "native" and json.loads(out)["sites"] == 14
    code, out, err = call("--adapter", tmp_path / "n", "--base", base, "--to", "peft", "--out", tmp_path / "p")
    assert code == 0 and "reads back to the same bits" in out
    assert (tmp_path / "p" / "adapter_model.safetensors").read_bytes() == (saved / "adapter_model.safetensors").read_bytes()
    assert formats.read_manifest(tmp_path / "p")["stop_ids"] == [5]


def test_a_folder_that_peft_wrote_converts_too(base, saved, tmp_path, call):
    shutil.copytree(saved, tmp_path / "theirs")
    (tmp_path / "theirs" / "MANIFEST.json").unlink()
    code, out, err = call("--adapter", tmp_path / "theirs", "--base", base, "--to", "native", "--out", tmp_path / "n")
    assert code == 0 and formats.read_manifest(tmp_path / "n")["method"] == "lora", err


@pytest.mark.parametrize("flags, words", [
    (["--to", "peft"], "is in that form already"), ([], "--to: missing"),
    (["--to", "native", "--alpha", 3], "--alpha: only with --from"),
    (["--to", "native", "--leave-out", "x"], "--leave-out: only with"), (["--to", "gguf"], "invalid choice")])
def test_flags_that_do_not_go_together_are_told_in_one_line(flags, words, saved, tmp_path, call):
    code, out, err = call("--adapter", saved, "--out", tmp_path / "o", *flags)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err and not (tmp_path / "o").exists()


def test_a_file_without_from_and_a_folder_with_it_say_so(saved, tmp_path, call):
    file = checkpoint(tmp_path / "a.pt", LINEAR)
    assert "give an adapter folder" in call("--adapter", file, "--to", "native", "--out", tmp_path / "o")[2]
    assert "is a folder" in call("--adapter", saved, "--from", "loralib", "--alpha", 1, "--out", tmp_path / "o")[2]
    assert "no adapter_config.json" in call("--adapter", tmp_path, "--to", "native", "--out", tmp_path / "o")[2]


@pytest.mark.parametrize("rank", [None, 1])
def test_a_method_becomes_a_lora_of_a_rank_and_what_is_lost_is_printed(rank, base, tmp_path, call):
    adapters = attach(AutoModelForCausalLM.from_pretrained(base))
    fill(adapters.add("a", OFT(targets=("q", "down"))), scale=0.3)
    adapters.save("a", tmp_path / "a", stop_ids=[2], extra={"kind": "chat"})
    flags = ["--rank", rank] if rank else []
    flags += ["--base", base, "--adapter", tmp_path / "a", "--out", tmp_path / "b"]
    code, out, err = call("--method", "lora", *flags, "--json")
    report = json.loads(out)
    assert code == 0 and report["from"] == "oft" and len(report["sites"]) == 4, err
    assert report["error"] > 0.1 if rank else report["error"] < 1e-6
    again = adapters.load("b", tmp_path / "b")
    assert again.cfg.name == "lora" and again.cfg.rank == report["rank"]
    assert formats.read_manifest(tmp_path / "b")["stop_ids"] == [2]
    with torch.no_grad():
        a, b, plain = (adapters.model(ids(2), adapter_ids=who).logits for who in ("a", "b", ()))
    assert difference(a, plain) > 1e-2 and (difference(a, b) > 1e-3 if rank else difference(a, b) < 1e-4)

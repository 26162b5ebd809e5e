"""Adapters on disk: what was saved comes back to the bit, and a damaged folder is one line, never a wrong adapter."""
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import METHOD_CASES, attached, difference, fill, fit, ids, tiny

from tsugiki import formats
from tsugiki.adapters import attach
from tsugiki.errors import UserError
from tsugiki.formats import disk
from tsugiki.methods import BitFit, LoRA, Prefix
from tsugiki.sites import FAMILIES

CONFIG, TENSORS, MANIFEST = disk.CONFIG, disk.TENSORS, disk.MANIFEST
VARIANTS = METHOD_CASES | {
    "lora-parts": LoRA(rank=2, targets=("q", "v"), alpha=7.5, rslora=True), "lora-head": LoRA(rank=2, targets=("head",)),
    "lora-regex": LoRA(rank=3, targets=r"\.1\..*(down|c_proj|fc2|4h_to_h|fc_out|o_proj)"), "bitfit-o": BitFit(targets=("o",))}


@pytest.mark.share(5)
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_is_the_identity(kind, variant, tmp_path):
    one = attach(tiny(kind))
    cfg = fit(one, VARIANTS[variant])
    adapter = fill(one.add("a", cfg))
    one.save("a", tmp_path / "a", stop_ids=(5, 2, 2), base="org/base", extra={"note": "é"})
    two = attach(tiny(kind))
    again = two.load("b", tmp_path / "a")
    stored, tensors = adapter.cfg.stored(adapter)
    assert again.cfg == stored and list(again.tensors()) == list(tensors)
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(tensors.values(), again.tensors().values(), strict=True))
    with torch.no_grad():
        assert difference(one.model(ids(2)).logits, two.model(ids(2)).logits) <= (0.0 if stored == cfg else 1e-5)
    manifest = formats.read_manifest(tmp_path / "a")
    assert manifest["stop_ids"] == [2, 5] and manifest["extra"] == {"note": "é"} and manifest["method"] == stored.name
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([CONFIG, TENSORS, MANIFEST])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_tensor_keeps_its_precision_on_disk(dtype, tmp_path):
    adapters = attached(tiny("llama", torch.float64 if dtype == torch.float64 else torch.float32), "lora", "prefix")
    for name in ("lora", "prefix"):
        for p in adapters.get(name).parameters().values():
            p.data = p.data.to(dtype)
        formats.save(adapters.get(name), tmp_path / name)
        assert {t.dtype for t in load_file(tmp_path / name / TENSORS).values()} == {dtype}
        again = attach(tiny("llama")).load("x", tmp_path / name)          # widened where the file is wider, never rounded
        for p, q in zip(adapters.get(name).parameters().values(), again.parameters().values(), strict=True):
            assert torch.equal(p.double(), q.double())


@pytest.fixture
def saved(tmp_path):
    adapters = attached(tiny("llama"), "lora", "bitfit", "prefix")
    for name in adapters.names():
        adapters.save(name, tmp_path / name)
    return tmp_path


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first(tensors):
    return sorted(tensors)[0]


def set_(key, value):
    return lambda d: d.update({key: value})


def rename(tensors):
    tensors["base_model.model.x.lora_A.weight"] = tensors.pop(first(tensors))


def reshape(tensors):
    tensors[first(tensors)] = tensors[first(tensors)].T.contiguous()


def swap(tensors):
    a, b = (k for k in sorted(tensors) if "0.self_attn.q_proj" in k or "0.self_attn.o_proj" in k if "lora_A" in k)
    tensors[a], tensors[b] = tensors[b], tensors[a].clone()


def put(value):
    def change(tensors):
        tensors[first(tensors)][0, 0] = value
    return change


ON_CONFIG = {
    "unknown field": (set_("use_magic", True), "use_magic: not a field of LORA"),
    "dora": (set_("use_dora", True), "lora_magnitude_vector is missing"),
    "bias": (set_("bias", "all"), "bias: 'all' is not supported (supported: 'none')"),
    "modules to save": (set_("modules_to_save", ["lm_head"]), "modules_to_save: \"['lm_head']\" is not supported"),
    "rank pattern": (set_("rank_pattern", {"q_proj": 2}), "has shape (4, 64), expected (2, 64)"),
    "alpha of a module that is not there": (set_("alpha_pattern", {"w_pack": 2}), "alphas: 'w_pack' matches no targeted site"),
    "alpha of another kind": (set_("alpha_pattern", {"q_proj": "2"}), "alphas: q_proj must be a number, got '2'"),
    "a pattern that never ends": (set_("alpha_pattern", {"(.+)+_never": 2}), "matches no targeted site"),
    "layers": (set_("layers_to_transform", [0]), "layers_to_transform"),
    "pissa": (set_("init_lora_weights", "pissa"), "init_lora_weights: 'pissa' is not supported"),
    "a task that is not language modelling": (set_("task_type", "SEQ_CLS"), "task_type: 'SEQ_CLS' is not supported"),
    "fan in": (set_("fan_in_fan_out", True), "fan_in_fan_out: is True, the base's weights say False"),
    "peft type": (set_("peft_type", "LORRA"), "peft_type: 'LORRA' is not supported; did you mean 'LORA'?"),
    "peft type of another kind": (set_("peft_type", 3), "peft_type: 3 is not supported"),
    "method PEFT has and we do not": (set_("peft_type", "VBLORA"), "peft_type: 'VBLORA' is not supported"),
    "rank of another kind": (set_("r", "4"), "rank must be a whole number, got '4'"),
    "no rank": (lambda d: d.pop("r"), "r: is missing"),
    "wrong rank": (set_("r", 5), "has shape (4, 64), expected (5, 64)"),
    "negative alpha": (set_("lora_alpha", -1), "alpha must be at least"),
    "dropout of 1": (set_("lora_dropout", 1.0), "dropout must be below 1.0"),
    "no targets": (set_("target_modules", []), "target_modules: must be a text or a list of texts"),
    "targets of another kind": (set_("target_modules", [1]), "target_modules: must be"),
    "a target that is not there": (lambda d: d["target_modules"].append("w_pack"), "target_modules: 'w_pack' matches no module"),
    "a target with no tensors": (lambda d: d["target_modules"].append("lm_head"),
                                 "base_model.model.lm_head.lora_A.weight is missing"),
    "a target that is no linear": (lambda d: d["target_modules"].append("embed_tokens"),
                                   "matches model.embed_tokens, which is nothing that lora can sit on"),
    "fewer targets": (lambda d: d["target_modules"].remove("q_proj"), "belongs to a module that target_modules does not name"),
    "a regex that never ends": (set_("target_modules", "(.+)+_never"), "matches no module"),
    "a regex that takes too long": (set_("target_modules", "(((((.?){30}){30}){30}){30}){30}x"), "repeats what repeats"),
    "no alpha": (lambda d: d.pop("lora_alpha"), "lora_alpha: is missing"),
    "a rank as large as the memory": (set_("r", 10 ** 9), "more than the tensors of the file hold"),
    "targets that are no regex": (set_("target_modules", "("), "is not a regular expression"),
}
ON_TENSORS = {
    "missing": (lambda t: t.pop(first(t)), "is missing"),
    "missing module": (lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.down" in k], "is missing"),
    "extra": (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}), "lm_head"),
    "extra of no kind": (lambda t: t.update(hello=torch.zeros(2)), "tensor hello"),
    "renamed": (rename, "tensor"), "transposed": (reshape, "has shape"),
    "NaN": (put(float("nan")), "holds NaN or infinity"), "infinity": (put(float("inf")), "holds NaN or infinity"),
    "whole numbers": (lambda t: t.update({first(t): t[first(t)].to(torch.int32)}), "is int32, not a floating-point tensor"),
    "nothing in it": (lambda t: t.clear(), "holds no tensor"),
}


def refused(folder, fragment, **options):
    adapters = attach(tiny("llama"))
    with pytest.raises(UserError) as e:
        adapters.load("x", folder, **options)
    text = str(e.value)
    assert fragment in text and "\n" not in text and len(text) < 700 and str(folder) in text, text
    assert adapters.names() == () and adapters.active == ()
    assert not any(t.posts or t.pres for t in adapters._taps.values())


@pytest.mark.parametrize("damage", ON_CONFIG)
def test_a_foreign_config_that_asks_for_something_else_is_refused(saved, damage):
    (saved / "lora" / MANIFEST).unlink()
    attach(tiny("llama")).load("x", saved / "lora")   # without a manifest it still loads: as a PEFT folder
    edit_json(saved / "lora" / CONFIG, ON_CONFIG[damage][0])
    refused(saved / "lora", ON_CONFIG[damage][1])


@pytest.mark.parametrize("damage", ON_TENSORS)
@pytest.mark.parametrize("foreign", [True, False], ids=["foreign", "ours"])
def test_damaged_tensors_are_refused_by_name(saved, damage, foreign):
    if foreign:
        (saved / "lora" / MANIFEST).unlink()
    edit_tensors(saved / "lora" / TENSORS, ON_TENSORS[damage][0])
    unreadable = damage in ("NaN", "infinity", "whole numbers", "nothing in it")
    refused(saved / "lora", ON_TENSORS[damage][1] if foreign or unreadable else "tensor ")


@pytest.mark.parametrize("name", ["lora", "bitfit", "prefix"])
@pytest.mark.parametrize("file", [CONFIG, TENSORS, MANIFEST])
def test_every_truncation_of_every_file_is_refused(saved, name, file):
    path = saved / name / file
    data = path.read_bytes()
    for cut in range(32):
        path.write_bytes(data[:len(data) * cut // 32])
        refused(saved / name, str(saved / name))


@pytest.mark.parametrize("name", ["lora", "bitfit", "prefix"])
@pytest.mark.parametrize("file", [CONFIG, TENSORS, MANIFEST])
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(saved, name, file):
    path = saved / name / file
    data = path.read_bytes()
    adapters = attach(tiny("llama"))
    right = adapters.load("right", saved / name)
    generator = torch.Generator().manual_seed(0)
    refusals = 0
    for i in torch.randint(len(data) * 8, (60,), generator=generator).tolist():
        path.write_bytes(data[:i // 8] + bytes([data[i // 8] ^ (1 << i % 8)]) + data[i // 8 + 1:])
        try:
            found = adapters.load("x", saved / name)
        except UserError as e:
            assert "\n" not in str(e)
            refusals += 1
            continue
        assert found.cfg == right.cfg                 # white space, or the file's own free text
        assert all(torch.equal(p, q) for p, q in zip(found.parameters().values(), right.parameters().values(), strict=True))
        adapters.remove("x")
    assert refusals >= 40 and adapters.names() == ("right",)


def test_values_swapped_between_sites_of_one_shape_are_noticed(saved):
    edit_tensors(saved / "lora" / TENSORS, swap)
    refused(saved / "lora", "was changed after it was written")


@pytest.mark.parametrize("change, says", [
    (set_("base", "0" * 64), "self: the manifest was changed"), (set_("tsugiki", 2), "version 2 is not known"),
    (set_("stop_ids", [1]), "self: the manifest was changed"), (lambda d: d.pop("self"), "self: the manifest")])
def test_an_edited_manifest_is_refused(saved, change, says):
    edit_json(saved / "lora" / MANIFEST, change)
    refused(saved / "lora", says)


def test_folders_that_are_no_adapter_are_refused(saved, tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    for file in (CONFIG, TENSORS):
        shutil.copytree(saved / "lora", tmp_path / file)
        (tmp_path / file / file).unlink()
        refused(tmp_path / file, "no such file")
    (tmp_path / TENSORS / "adapter_model.bin").write_bytes(b"x")
    refused(tmp_path / TENSORS, "is a pickle, which can run code")
    fused = attach(tiny("phi3"))                      # a form of our own: PEFT has no parts of fused weights
    fused.add("parts", LoRA(targets=("q",)))
    fused.save("parts", saved / "parts")
    (saved / "parts" / MANIFEST).unlink()
    refused(saved / "parts", "not an adapter that can be checked")
    for text, says in (("[]", "holds a list"), ("{\"a\": 1, \"a\": 2}", "'a' is there twice"), ("{\"a\": NaN}", "NaN is not JSON"),
                       ("\ufeff{}", "not a JSON file"), ("[" * 100000, "not a JSON file"), ("", "not a JSON file")):
        (saved / "lora" / CONFIG).write_text(text)
        refused(saved / "lora", says)
    (saved / "prefix" / CONFIG).write_bytes(b"\xff\xfe")
    refused(saved / "prefix", "not a JSON file")


def test_an_adapter_of_another_base_is_refused_unless_it_is_asked_for(saved):
    other = tiny("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(0.01)
    adapters = attach(other)
    with pytest.raises(UserError, match="base: the adapter was made on another base model"):
        adapters.load("x", saved / "lora")
    assert difference(other(ids(2), adapter_ids=()).logits, adapters.load("x", saved / "lora", check_base=False)
                      and other(ids(2)).logits) > 1e-3


def test_an_adapter_saved_while_merged_names_the_plain_base(saved, tmp_path):
    adapters = attached(tiny("llama"), "lora")
    adapters.merge("lora")
    adapters.save("lora", tmp_path / "merged")
    attach(tiny("llama")).load("x", tmp_path / "merged")


def test_saving_replaces_an_adapter_whole_and_nothing_else(saved, tmp_path):
    adapters = attached(tiny("llama"), "lora")
    fill(adapters.get("lora"), seed=9)
    adapters.save("lora", saved / "bitfit")
    assert attach(tiny("llama")).load("x", saved / "bitfit").cfg.name == "lora"
    assert sorted(p.name for p in saved.iterdir()) == ["bitfit", "lora", "prefix"]
    (saved / "lora" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds 'thesis.tex'"):
        adapters.save("lora", saved / "lora")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        adapters.save("lora", tmp_path / "file")
    with torch.no_grad():
        next(iter(adapters.get("lora").parameters().values()))[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite; nothing was saved"):
        adapters.save("lora", saved / "prefix")
    attach(tiny("llama")).load("x", saved / "prefix")


def test_a_save_cut_off_at_any_point_leaves_the_old_or_the_new_adapter(saved, monkeypatch):
    adapters = attached(tiny("llama"), "lora")
    old = attach(tiny("llama")).load("x", saved / "prefix").cfg

    class Cut(BaseException):
        pass
    for stop in range(40):
        left = [stop]

        def counted(function, left=left):
            def run(*a, **k):
                left[0] -= 1
                if left[0] < 0:
                    raise Cut
                return function(*a, **k)
            return run
        target = saved / f"cut{stop}"
        shutil.copytree(saved / "prefix", target)
        with monkeypatch.context() as patch:
            patch.setattr(disk.os, "fsync", counted(disk.os.fsync))
            patch.setattr(disk.Path, "rename", counted(disk.Path.rename))
            patch.setattr(disk.Path, "mkdir", counted(disk.Path.mkdir))
            patch.setattr(disk.shutil, "rmtree", lambda path, ignore_errors=False, real=shutil.rmtree, left=left:
                          real(path, ignore_errors) if left[0] >= 0 else None)
            try:
                adapters.save("lora", target)
                done = True
            except Cut:
                done = False
        found = attach(tiny("llama")).load("x", target).cfg
        assert found == adapters.get("lora").cfg if done else found in (old, adapters.get("lora").cfg)
        adapters.save("lora", target)
        assert attach(tiny("llama")).load("x", target).cfg == adapters.get("lora").cfg
        if done:
            break
    assert done and stop > 5


def test_two_threads_that_load_at_once_get_their_own(saved):
    adapters, failed = attach(tiny("llama")), []

    def work(name, i):
        try:
            adapters.load(f"{name}{i}", saved / name)
        except Exception as e:
            failed.append(e)
    threads = [threading.Thread(target=work, args=(n, i)) for i in range(4) for n in ("lora", "bitfit", "prefix")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed and len(adapters.names()) == 12
    assert isinstance(adapters.get("prefix3").cfg, Prefix)

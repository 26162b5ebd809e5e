"""`tsugiki methods`: what the table says is what a probe finds, a method that is wrong FAILS, and the documents say the same."""
from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny

from tsugiki import bench, capabilities
from tsugiki.capabilities import PROPERTIES, probe
from tsugiki.cli.main import main
from tsugiki.edit import Edit
from tsugiki.errors import UserError
from tsugiki.methods import METHODS, BitFit, Full, LoRA
from tsugiki.methods.bitfit import BitFitEdit

ROOT = Path(__file__).parents[1]
quant = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def found():
    return capabilities.capabilities()


@quant
def test_the_documents_say_what_the_probes_find(found):
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for path, text in script.documents(found).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"


@quant
def test_every_method_has_an_answer_to_every_question_and_none_is_wrong(found):
    assert found.keys() == METHODS.keys()
    for name, answers in found.items():
        assert answers.keys() == PROPERTIES.keys()
        for key, answer in answers.items():
            assert answer.says in ("yes", "no", "-"), f"{name} {key}: {answer.says}: {answer.why}"
            assert answer.says == "yes" or answer.why and "\n" not in answer.why


def test_a_no_is_what_the_core_refuses(found):
    for name, cls in METHODS.items():
        parts = cls().parts
        if parts:
            assert (found[name]["merge"].says == "yes") == all(part.edit.merge is not Edit.merge for part in parts), name
            assert (found[name]["packed"].says == "no") == any(part.edit.virtual for part in parts), name
            assert found[name]["peft"].says == "no" or cls.peft is not None, name
        else:
            assert found[name]["merge"].says == "-"


class Wrong(BitFitEdit):
    """Each fault is one that a method could have."""
    fault = ""

    def __init__(self, config, site, start):
        super().__init__(config, site, start)
        if self.fault == "identity":
            with torch.no_grad():
                self.offset += 0.1
        self.unused = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) if self.fault == "checkpointing" else None

    def post(self, x, y, ctx):
        if self.fault == "mixed":
            return y + self.offset.to(y.dtype) * y.mean(0, keepdim=True)      # looks at its neighbours
        if self.fault == "packed":
            return y + self.offset.to(y.dtype) * torch.arange(y.shape[1], dtype=y.dtype)[:, None]
        if self.fault == "compile":
            return y + self.offset.to(y.dtype) if y.sum() < 1e9 else y        # Python looks at data
        if self.fault == "cache":
            return y + self.offset.to(y.dtype) * y.shape[1]
        return super().post(x, y, ctx)

    def merge(self, w, b, site):
        w, b = super().merge(w, b, site)
        return (w, b * 1.001) if self.fault == "merge" else (w, b)


@pytest.mark.parametrize("fault", ["identity", "checkpointing", "mixed", "packed", "compile", "cache", "merge"])
def test_a_method_that_is_wrong_fails_its_probe_and_a_right_one_does_not(fault):
    bad = type("Bad", (Wrong,), {"fault": fault})
    cfg = type("BadConfig", (BitFit,), {"name": "bad", "edit": bad})()
    answer = probe(bench.Bench(), cfg, fault)
    assert answer.says == "FAILS" and answer.why, answer
    good = type("GoodConfig", (BitFit,), {"name": "good", "edit": type("Good", (Wrong,), {})})()
    assert probe(bench.Bench(), good, fault).says == "yes"


def test_after_a_failure_the_next_probe_sees_models_as_new():
    b = bench.Bench()

    def breaks(self, x, y, ctx):
        raise RuntimeError("broken")
    cfg = type("BadConfig", (BitFit,), {"name": "bad", "edit": type("Bad", (Edit,), {"post": breaks})})()
    assert probe(b, cfg, "mixed").says == "FAILS" and "RuntimeError: broken" in probe(b, cfg, "mixed").why
    assert probe(b, LoRA(), "mixed").says == probe(b, LoRA(), "merge").says == "yes"


def test_a_library_that_is_not_there_is_told_as_such(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    answer = probe(bench.Bench(), LoRA(), "few")
    assert answer.says == "not installed" and "pip install" in answer.why


def test_names_that_are_not_known_are_one_line():
    for call in (lambda: capabilities.capabilities(["lorra"]), lambda: capabilities.capabilities(["lora"], ["merg"])):
        with pytest.raises(UserError, match="did you mean"):
            call()


def test_sizes_on_a_base_are_those_of_the_adapter_itself(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    home = bench.attach(model)
    for name, cls in METHODS.items():
        if name == "full":
            continue
        size = capabilities.size(str(tmp_path / "base"), cls())
        adapter = home.add(name, cls())
        assert size.trainable == sum(p.numel() for p in adapter.parameters().values()), name
        path = home.save(name, tmp_path / name) / "adapter_model.safetensors"
        assert abs(path.stat().st_size - size.file) <= 0.02 * size.file + 300 * len(cls().stored(adapter)[1]), name
        home.remove(name)
        assert size.rate == cls.small_lr, name        # the base is 64 wide
    whole = capabilities.size(str(tmp_path / "base"), Full())
    assert whole.trainable == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.adapter_shared.parameters())


def test_the_command_prints_a_table_and_one_object(capsys, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["methods", "--method", "prefix", "--why", "--base", str(tmp_path), "--quiet"]) == 0
    out = capsys.readouterr()
    assert out.err == "" and "prefix: merge: prefix is not a change of weights" in out.out
    trained = capabilities.size(str(tmp_path), METHODS["prefix"]()).trainable
    assert out.out.splitlines()[0].split()[0] == "method" and f"  {trained:,}  " in out.out
    assert out.out.splitlines()[0].split()[-1] == "rate" and f"  {METHODS['prefix'].small_lr:g}\n" in out.out
    assert main(["methods", "--method", "bitfit", "--json"]) == 0
    out = capsys.readouterr()
    made = json.loads(out.out)
    assert made["methods"]["bitfit"].items() >= {"lr": METHODS["bitfit"].lr, "small_lr": METHODS["bitfit"].small_lr}.items()
    assert set(made) == {"methods", "properties", "failed"} and made["failed"] == [] and "probe" in out.err
    assert made["methods"]["bitfit"]["properties"]["unmerge"] == dataclasses.asdict(capabilities.Answer("yes", "", 0.0))
    assert main(["methods", "--method", "lorra"]) == 2
    assert "did you mean 'lora'" in capsys.readouterr().err

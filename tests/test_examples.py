"""The examples run, and do what they say."""
from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from tiny import tiny
from tokenizers_tiny import tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A tiny model folder, as a user would have one."""
    folder, words = tmp_path_factory.mktemp("base"), tokenizer()
    tiny("llama", vocab_size=len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def test_every_example_has_a_test():
    tested = set(re.findall(r'example\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert {p.stem for p in EXAMPLES.glob("*.py")} == tested


def test_train_lora(base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": " It is four."}) + "\n" for n in range(48)))
    example("train_lora").main(base, str(rows), str(tmp_path / "out"), "Say 7.")
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file() and (tmp_path / "out" / "report.html").is_file()
    assert "3 steps" in said and "base:" in said and "adapter:" in said


def test_mixed_batch(base, capsys):
    example("mixed_batch").main(base)
    said = capsys.readouterr().out
    assert float(re.search(r"ten steps: ([\d.]+)", said)[1]) < 6.0, "ten steps at this rate learn something"
    differences = [float(d) for d in re.findall(r"batch of one by (\S+)", said)]
    assert len(differences) == 3 and max(differences) < 1e-5


def test_custom_family(capsys):
    example("custom_family").main()
    said = capsys.readouterr().out
    assert "'granite' is not known" in said and "merged into 6 modules" in said
    assert float(re.search(r"differ by (\S+)", said)[1]) < 1e-5


def test_train_many(tmp_path, capsys):
    example("train_many").main(str(tmp_path / "out"), steps=6)
    said = capsys.readouterr().out
    found = {name: (float(a), float(b)) for name, a, b in re.findall(r"(\w+): loss ([\d.]+) -> ([\d.]+) in 6 steps", said)}
    assert found.keys() == {"arithmetic", "intent", "past", "record"} and all(after < before for before, after in found.values())
    assert all((tmp_path / "out" / name / "adapter" / "adapter_model.safetensors").is_file() for name in found)


def test_serve_client(capsys, monkeypatch):
    from serve_kit import KEY, Script, service, serving

    from tsugiki.serve.auth import Keys
    monkeypatch.setenv("TSUGIKI_KEY", KEY)
    with serving(service(Script(words=2), keys=Keys((KEY.encode(),)))) as url:
        answers = example("serve_client").main(url, "Hello?")
    assert answers == {"base": " the base the base", "alpha": " alpha alpha", "beta": " beta beta"}
    assert "alpha  alpha alpha" in capsys.readouterr().out

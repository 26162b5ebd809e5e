"""Small real runs for the tests: rows on disk, a tokenizer, tiny models, every method as a configuration, what a run leaves."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import small, tiny
from tokenizers_tiny import tokenizer
from torch import nn

from tsugiki.adapters import attach
from tsugiki.config import RunConfig, build
from tsugiki.data import Renderer, load_conversations
from tsugiki.formats.native import settings
from tsugiki.methods import METHODS, Full
from tsugiki.train.rows import read_rows
from tsugiki.train.run import Result, run

run_module = sys.modules["tsugiki.train.run"]         # `tsugiki.train` itself is the public function
TOKENIZER = tokenizer("bytes", bos="<s>", eos="</s>", adds_bos=True)
PAD = 3
TIMES = ("seconds", "tokens_per_second")              # what a clock says is no promise
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


def _cases() -> dict:
    """Every method at a small size; those that drop inputs also with dropout. A new method's file adds itself."""
    found = {}
    for name, cls in METHODS.items():
        found[name] = small(cls)
        if any(f.name == "dropout" for f in dataclasses.fields(cls)):
            found[f"{name}+dropout"] = small(cls, dropout=0.1)
    return found


CASES = _cases()
ADAPTERS = {name: cfg for name, cfg in CASES.items() if cfg.parts}


def llama(dtype: torch.dtype = torch.float32, kind: str = "llama", **more) -> nn.Module:
    """A tiny model of the tokenizer's vocabulary."""
    return tiny(kind, dtype, **{"vocab_size": len(TOKENIZER)} | more)


def lines(n: int = 22, start: int = 0) -> list[dict]:
    """Rows of unequal lengths: a little counting."""
    return [{"prompt": f"{WORDS[i % 12]} and {i % 5} {'so ' * (i % 7)}is", "completion": f" {WORDS[(i + i % 5) % 12]}"}
            for i in range(start, start + n)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(out: Path, method="lora", rows: int = 22, held: bool = False, eval: dict | None = None, **train) -> RunConfig:
    """A run's configuration; its data files lie beside `out`."""
    cfg = CASES[method] if isinstance(method, str) else method
    data = {"files": [str(write(out.parent / f"rows-{rows}.jsonl", lines(rows)))]}
    if held:
        data["eval"] = [str(write(out.parent / "held.jsonl", lines(6, 100)))]
    train = {"batch_size": 4, "steps": 9, "lr": 1e-2, "log_steps": 1, "save_steps": 1, "save_keep": 99, "dtype": "fp32"} | train
    return build(RunConfig, {"base": "", "out": str(out), "method": {"name": cfg.name} | settings(cfg), "data": data,
                             "train": train, "eval": {"max_new_tokens": 4} | (eval or {})})


def go(cfg: RunConfig, model: nn.Module | None = None, say=lambda line: None) -> Result:
    """Run it on a new tiny Llama, or on `model`."""
    return run(model if model is not None else llama(), TOKENIZER, cfg, read_rows(cfg, say), quiet=True, say=say)


def result_bits(result: Result) -> dict[str, torch.Tensor]:
    """The tensors a run has saved as its result."""
    return {n: t for file in sorted(result.saved.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(out: Path) -> list[dict]:
    """Lines of metrics.jsonl without what a clock said."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-*"))


def left(out: Path) -> dict:
    """Everything a run leaves that must not depend on when it was stopped: result, last checkpoint, metrics."""
    state = json.loads((newest(out) / "state.json").read_text())
    state = {k: v for k, v in state.items() if k not in ("seconds", "offset")}
    files = [*newest(out).glob("*.safetensors"), *out.glob("adapter/*.safetensors"), *out.glob("model/*.safetensors")]
    return {"state": state, "metrics": metrics(out),
            "files": {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}}


def examples(rows: list[dict], folder: Path, max_length: int = 128):
    return Renderer(TOKENIZER).examples(load_conversations([write(folder / "rows.jsonl", rows)]), max_length)[0]


def trainable(model: nn.Module, cfg, seed: int = 0) -> tuple[dict[str, nn.Parameter], str | None]:
    """(trained parameters by name, adapter name) of a method on a model, with nothing else requiring gradients."""
    if isinstance(cfg, Full):
        chosen = cfg.select(model)
        for p in model.parameters():
            p.requires_grad_(any(p is q for q in chosen.values()))
        return chosen, None
    return attach(model).add("a", cfg, seed=seed).parameters(), "a"


def cut(whole: Path, out: Path, step: int) -> None:
    """The folder of `whole` as a kill after `step` left it."""
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "adapter", ignore_errors=True)
    shutil.rmtree(out / "model", ignore_errors=True)

"""A run's folder: it belongs to one run, a mistake found before the first step leaves it free, and a finished run is finished."""
import dataclasses
import re
from dataclasses import replace

import pytest
import torch
import yaml
from kit import CASES, TOKENIZER, config, go, left, lines, llama, newest, result_bits, same, write
from torch import nn

import tsugiki as tg
from tsugiki.adapters import attach
from tsugiki.config import RunConfig, build
from tsugiki.edit import Config, Edit
from tsugiki.errors import RunError, UserError
from tsugiki.methods import METHODS, BitFit, Full, LoRA
from tsugiki.train import loop
from tsugiki.train import run as run_module
from tsugiki.train.rows import read_rows
from tsugiki.train.run import check_folder


def explode(*args, **kwargs):
    raise AssertionError("a step was trained")


@pytest.mark.share(2)
@pytest.mark.parametrize("name", CASES)
def test_a_finished_run_given_again_says_so_and_trains_nothing(name, tmp_path, monkeypatch):
    first = go(config(tmp_path / "run", name, held=True, save_steps=0))
    want, bits = left(tmp_path / "run"), result_bits(first)
    monkeypatch.setattr(loop, "train_step", explode)
    said = []
    again = go(config(tmp_path / "run", name, held=True, save_steps=0), say=said.append)
    assert any("finished" in line for line in said) and left(tmp_path / "run") == want
    assert same(result_bits(again), bits) and again.plain() | {"seconds": 0} == first.plain() | {"seconds": 0}


CHANGES = {
    "train.lr": {"train": {"lr": 2e-2}}, "train.seed": {"train": {"seed": 7}}, "train.batch_size": {"train": {"batch_size": 5}},
    "train.steps": {"train": {"steps": 12}}, "method.rank": {"method": {"rank": 5}}, "method.name": {"method": {"name": "bitfit"}},
    "adapter": {"adapter": "other"}, "train.layout": {"train": {"layout": "pack"}}, "data.train_on": {"data": {"train_on": "last"}},
}


def changed(cfg: RunConfig, change: dict) -> RunConfig:
    values = dataclasses.asdict(cfg)
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and "name" not in value else value
    return build(RunConfig, values)


@pytest.mark.parametrize("key", CHANGES)
def test_another_configuration_on_the_same_folder_is_refused_in_one_line_that_names_the_key(key, tmp_path):
    cfg = config(tmp_path / "run", steps=2)
    go(cfg)
    want = left(tmp_path / "run")
    with pytest.raises(UserError, match=rf"holds another run \({re.escape(key)} is ") as caught:
        go(changed(cfg, CHANGES[key]))
    assert "\n" not in str(caught.value) and left(tmp_path / "run") == want


def test_other_rows_are_another_run_and_inert_keys_are_not(tmp_path):
    cfg = config(tmp_path / "run", steps=2)
    go(cfg)
    write(tmp_path / "rows-22.jsonl", lines(21))
    with pytest.raises(UserError, match="holds another run .the rows are others"):
        go(cfg)
    write(tmp_path / "rows-22.jsonl", lines(22))
    moved = write(tmp_path / "elsewhere" / "same.jsonl", lines(22))
    go(changed(cfg, {"train": {"log_steps": 3, "save_steps": 5, "save_keep": 1}, "device": "cpu", "data": {"files": [str(moved)]}}))


def test_another_chat_template_in_the_same_file_is_another_run(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
                        "{{ 'assistant: ' if add_generation_prompt else '' }}")
    rows = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": f"Hi {i}"},
                                                         {"role": "assistant", "content": "Yes."}]} for i in range(8)])
    cfg = changed(config(tmp_path / "run", steps=2), {"data": {"files": [str(rows)], "template": str(template)}})
    go(cfg)
    template.write_text(template.read_text().replace(": '", " says '"))
    with pytest.raises(UserError, match="holds another run"):
        go(cfg)


@pytest.mark.parametrize("fault", ["missing", "not text"])
def test_a_template_that_cannot_be_read_is_found_with_the_data(fault, tmp_path):
    path = tmp_path / "chat.jinja"
    if fault == "not text":
        path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="data.template: .*chat.jinja"):
        read_rows(changed(config(tmp_path / "run"), {"data": {"template": str(path)}}), print)


class Nothing(Edit):
    pass


BAD = {
    "no such role": ({"targets": ["qq"]}, "no site has the role 'qq'"),
    "a regex that matches nothing": ({"targets": "nowhere\\d"}, "no site name matches"),
    "a broken regex": ({"targets": "(("}, "not a regular expression"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_target_that_matches_nothing_stops_before_the_first_step_and_leaves_the_folder_free(fault, tmp_path, monkeypatch):
    values, reason = BAD[fault]
    cfg = config(tmp_path / "run", steps=2)
    with monkeypatch.context() as m:
        m.setattr(loop, "train_step", explode)
        with pytest.raises(UserError, match=reason):
            go(changed(cfg, {"method": values}))
    assert not (tmp_path / "run").exists()
    go(cfg)                                            # the mistake mended, the same folder is taken


def test_full_parameters_that_match_nothing_stop_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", explode)
    for method, reason in ((Full(params="nowhere"), "no parameter name matches"), (Full(last=9), "the model has 2 layers")):
        with pytest.raises(UserError, match=reason):
            go(config(tmp_path / "run", method))


def test_a_method_that_trains_nothing_stops_before_the_first_step(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Idle(Config):
        targets = "linear"
        name = "idle"
        edit = Nothing
        lr = 1.0
    monkeypatch.setattr(loop, "train_step", explode)
    monkeypatch.setitem(__import__("tsugiki.methods").methods.METHODS, "idle", Idle)
    with pytest.raises(UserError, match="idle.* nothing to train"):
        go(changed(config(tmp_path / "run"), {"method": {"name": "idle"}}))


def test_rows_of_which_no_answer_is_left_stop_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", explode)
    with pytest.raises(UserError, match="leaves no answer token"):
        go(config(tmp_path / "run", max_length=3))
    silent = write(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "a"},
                                                             {"role": "assistant", "content": "b", "weight": 0}]}])
    with pytest.raises(UserError, match=r"silent\.jsonl:1"):
        go(changed(config(tmp_path / "run"), {"data": {"files": [str(silent)]}}))


def test_a_kill_before_run_yaml_is_whole_leaves_the_folder_usable_and_a_damaged_one_is_named(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.yaml.tmp").write_text("base: hal")
    cfg = config(out, steps=2)
    go(cfg)
    values = yaml.safe_load((out / "run.yaml").read_text())
    assert values["method"]["rank"] == 4 and values["train"]["lr"] == 1e-2 and len(values["data_sha256"]) == 64
    assert not (out / "run.yaml.tmp").exists()
    for damaged in ("", "[1, 2", "- a\n", "a: &a [*a"):
        (out / "run.yaml").write_text(damaged)
        with pytest.raises(UserError, match="run.yaml"):
            check_folder(out, cfg, "")


@pytest.mark.parametrize("there", ["a file", "a folder of other things"])
def test_a_folder_of_other_things_is_not_taken(there, tmp_path):
    out = tmp_path / "run"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        go(config(out))
    assert [p.read_text() for p in ([out] if out.is_file() else out.iterdir())] == ["mine"]


def test_a_learning_rate_of_zero_is_zero(tmp_path):
    go(config(tmp_path / "run", "bitfit", lr=0.0, steps=3))
    assert all(not t.any() for t in result_bits_of(tmp_path / "run").values())
    assert all(line["lr"] == 0 for line in left(tmp_path / "run")["metrics"])


def result_bits_of(out):
    from safetensors.torch import load_file
    return load_file(newest(out) / "params.safetensors")


def test_without_a_learning_rate_the_methods_own_is_used(tmp_path):
    said = []
    go(config(tmp_path / "run", "bitfit", lr=None, steps=1, warmup=0.0), say=said.append)
    assert left(tmp_path / "run")["metrics"][0]["lr"] == BitFit.small_lr != BitFit.lr        # a base 64 wide
    assert any(f"learning rate {BitFit.small_lr:g} (bitfit's for a base 64 wide)" in line for line in said)
    go(config(tmp_path / "given", "bitfit", lr=0.5, steps=1, warmup=0.0), say=said.append)
    assert left(tmp_path / "given")["metrics"][0]["lr"] == 0.5 and any(s.endswith("learning rate 0.5") for s in said)


def test_the_rate_to_start_from_depends_on_the_bases_width(tmp_path, monkeypatch):
    class Both(Config):
        name, lr, small_lr = "both", 2e-4, 2e-3

    class Extended(Both):
        name, lr = "extended", 1e-3                   # its own: the small one of Both was found for Both

    class Renamed(Both):
        name = "renamed"
    assert [Both.rate(w) for w in (8, 256, 2048, 8192)] == [2e-3, 2e-3, 2e-4, 2e-4]
    assert Both.rate(724) == pytest.approx(2e-3 * 10 ** -0.5, rel=0.02) and Both.rate(576) == 8.1e-4    # 724: half-way in log
    assert 2e-3 >= Both.rate(257) > Both.rate(300) > Both.rate(1024) > Both.rate(1900) > 2e-4
    assert [Extended.rate(w) for w in (8, 700, 9000)] == [1e-3] * 3 and Renamed.rate(256) == 2e-3
    for cls in METHODS.values():
        assert (cls.rate(256), cls.rate(4096)) == (cls.small_lr or cls.lr, cls.lr) and 0 < cls.rate(700) < 10
    monkeypatch.setattr(run_module, "width", lambda model: 576)
    go(config(tmp_path / "run", "lora", lr=None, steps=1, warmup=0.0))
    assert left(tmp_path / "run")["metrics"][0]["lr"] == METHODS["lora"].rate(576) == 8.1e-4


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("name", ["prompt", "prefix", "lora"])
def test_rows_as_long_as_the_models_positions_train_and_are_scored_with_room_for_virtual_tokens(kind, name, tmp_path):
    size = {"n_positions": 24} if kind == "gpt2" else {"max_position_embeddings": 24}
    rows = write(tmp_path / "long.jsonl", [{"prompt": "a b c d", "completion": " " + "so so " * 20}] * 4)
    cfg = config(tmp_path / "run", name, held=True, steps=2, eval={"metric": "exact", "max_new_tokens": 40})
    cfg = replace(cfg, data=replace(cfg.data, files=[str(rows)], eval=[str(rows)]))
    said = []
    result = go(cfg, llama(kind=kind, **size), say=said.append)
    assert any("4 of 4 rows were longer" in line for line in said) and result.progress.after["cut"] == 4


def test_the_library_trains_an_adapter_added_before_and_refuses_another_method_for_it(tmp_path):
    model, rows = llama(), write(tmp_path / "rows.jsonl", lines(8))
    adapters = tg.attach(model)
    adapters.add("mine", LoRA(rank=2))
    result = tg.train(model, TOKENIZER, rows, tmp_path / "run", adapter="mine", quiet=True, steps=2, lr=0.01, dtype="fp32")
    assert result.trainable == sum(p.numel() for p in adapters.parameters("mine")) and result.saved.name == "adapter"
    assert any(float(p.detach().abs().max()) > 0 for n, p in adapters.get("mine").parameters().items() if n.endswith(".B"))
    with pytest.raises(UserError, match="mine.* made from LoRA"):
        tg.train(model, TOKENIZER, rows, tmp_path / "other", adapter="mine", method=BitFit(), quiet=True)
    with pytest.raises(UserError, match="train.epoch: unknown key; did you mean 'epochs'"):
        tg.train(model, TOKENIZER, rows, tmp_path / "other", epoch=2)


def test_a_base_in_16_bits_is_fully_trained_in_32(tmp_path):
    model = llama(torch.bfloat16)
    go(config(tmp_path / "run", Full(last=1), steps=2), model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_scoring_the_base_leaves_it_as_it_was(tmp_path):
    model, rows = llama(), write(tmp_path / "rows.jsonl", lines(6))
    score = tg.evaluate(model, TOKENIZER, rows, metric="loss")
    assert score.n == 6 and not hasattr(model, "adapters") and all(p.requires_grad for p in model.parameters())
    assert tg.generate(model, TOKENIZER, "one and", max_new_tokens=3) is not None and not hasattr(model, "adapters")
    attach(model).add("a", LoRA(rank=2))
    assert tg.evaluate(model, TOKENIZER, rows, metric="loss").loss == score.loss


def test_a_held_out_loss_that_is_not_finite_stops_and_names_a_row(tmp_path):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(RunError, match=r"not finite in 6 held-out rows, first .*held\.jsonl:1"):
        go(config(tmp_path / "run", held=True), model)


def test_every_trained_tensor_of_a_run_is_an_ordinary_parameter():
    assert all(isinstance(p, nn.Parameter) for p in Full().select(llama()).values())

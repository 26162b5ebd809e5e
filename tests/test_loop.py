"""The loop: looking never changes what is trained, signals save and stop, faults stop before the update, the best is kept."""
import random
import signal

import numpy
import pytest
import torch
from kit import CASES, config, go, left, lines, llama, newest, result_bits, same
from safetensors.torch import load_file

from tsugiki.data import load_conversations
from tsugiki.errors import RunError
from tsugiki.evaluate.score import Score
from tsugiki.train import loop, scoring
from tsugiki.train.loop import Interrupted

LOOKS = {"never": {"held": False}, "at the ends": {"held": True},
         "every step, by loss": {"held": True, "eval_steps": 1, "eval": {"metric": "loss"}},
         "every step, by answers": {"held": True, "eval_steps": 1, "eval": {"metric": "exact"}},
         "every other step, by choice": {"held": True, "eval_steps": 2, "eval": {"metric": "choice"}}}


@pytest.mark.share(3)
@pytest.mark.parametrize("name", CASES)
def test_evaluating_every_step_or_never_trains_the_same_bits(name, tmp_path):
    found = {}
    for how, look in LOOKS.items():
        result = go(config(tmp_path / how.replace(" ", "-") / "run", name, steps=6, save_steps=0, **look))
        found[how] = result_bits(result)
        assert bool(result.progress.after) == look["held"] and bool(result.progress.samples) == look["held"]
    for how, bits in found.items():
        assert same(bits, found["never"]), f"evaluating {how} changed the training"


def test_logging_and_saving_more_or_less_often_trains_the_same_bits(tmp_path):
    want = result_bits(go(config(tmp_path / "a" / "run", "lora+dropout")))
    for n, often in enumerate(({"log_steps": 7}, {"save_steps": 0}, {"save_steps": 4, "save_keep": 1})):
        assert same(result_bits(go(config(tmp_path / str(n) / "run", "lora+dropout", **often))), want), often
    assert not same(result_bits(go(config(tmp_path / "b" / "run", "lora+dropout", seed=1))), want)


@pytest.mark.share(2)
@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluating_touch_no_global_generator(name, tmp_path):
    model = llama()
    cfg = config(tmp_path / "run", name, held=True, steps=3, eval_steps=1)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    first = result_bits(go(cfg, model))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]
    model = llama()
    torch.manual_seed(99)
    random.seed(99)
    again = config(tmp_path / "again" / "run", name, held=True, steps=3, eval_steps=1)
    assert same(result_bits(go(again, model)), first), "the result depends on the global generators"


def test_a_model_in_training_mode_with_dropout_of_its_own_trains_the_same_bits(tmp_path):
    want = result_bits(go(config(tmp_path / "a" / "run", steps=3), llama(kind="gpt2")))
    model = llama(kind="gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert same(result_bits(go(config(tmp_path / "b" / "run", steps=3), model)), want)


def at_step(monkeypatch, step: int, act) -> None:
    """Do something as the loop begins `step`."""
    plain = loop.train_step

    def wrapped(*args, **kwargs):
        if kwargs["step"] == step:
            act(*args)
        return plain(*args, **kwargs)
    monkeypatch.setattr(loop, "train_step", wrapped)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["lora+dropout", "full"])
def test_a_signal_saves_and_stops_and_the_same_command_ends_in_the_same_bits(name, signum, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    go(config(whole, name, save_steps=0))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 5, lambda *args: signal.raise_signal(signum))
    with pytest.raises(Interrupted, match=rf"{signum.name} at step 5 of 9, saved") as caught:
        go(config(out, name, save_steps=0))
    assert caught.value.code == 128 + signum and newest(out).name == "step-00000005" and not (out / "adapter").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    monkeypatch.undo()
    go(config(out, name, save_steps=0))
    assert left(out) == left(whole)


def test_a_second_signal_acts_as_usual(tmp_path, monkeypatch):
    def twice(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    at_step(monkeypatch, 3, twice)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)      # a job in the background starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            go(config(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert newest(tmp_path / "run").name == "step-00000002"


@pytest.mark.share(2)
@pytest.mark.parametrize("name", CASES)
def test_a_fault_in_a_frozen_weight_stops_the_run_and_the_checkpoint_is_good(name, tmp_path, monkeypatch):
    """A NaN comes into one token's embedding before step 6: nothing after step 5 is kept, and the run can go on from there."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    go(config(whole, name))
    cfg = config(out, name)
    row = load_conversations(cfg.data.files)[0]

    def poison(model, batches, params, *rest):
        with torch.no_grad():
            real = batches[0].ids[0][batches[0].samples[0] >= 0]
            model.get_input_embeddings().weight[int(real[2]), 0] = float("nan")
    at_step(monkeypatch, 6, poison)
    with pytest.raises(RunError, match=rf"step 6: .*{row.where.rpartition(':')[0]}:\d+") as caught:
        go(cfg)
    assert not hasattr(caught.value, "code") and "\n" not in str(caught.value)
    assert newest(out).name == "step-00000005" and not (out / "adapter").exists() and not (out / "model").exists()
    assert all(torch.isfinite(t).all() for f in newest(out).glob("*.safetensors") for t in load_file(f).values())
    monkeypatch.undo()
    go(cfg)
    assert left(out) == left(whole)


def scripted(monkeypatch, values: list[float], metric: str) -> None:
    """Evaluations give these values, the first before training."""
    left_over = iter(values)
    monkeypatch.setattr(scoring, "evaluate", lambda *a, **k: Score(metric, value := next(left_over), 6, value))


@pytest.mark.parametrize("metric, values, best", [
    ("accuracy", [0.9, 0.1, 0.6, 0.3, 0.5, 0.2, 0.6], 4), ("loss", [0.1, 5.0, 4.0, 3.0, 2.0, 3.0, 2.0], 8)])
def test_the_best_weights_by_the_metric_are_the_result(metric, values, best, tmp_path, monkeypatch):
    scripted(monkeypatch, values, metric)
    result = go(config(tmp_path / "run", "bitfit", held=True, steps=10, eval_steps=2, keep="best"))
    assert result.progress.best_step == best, "the base's own score, before training, is no candidate"
    kept = load_file(tmp_path / "run" / "checkpoints" / f"step-{best:08d}" / "params.safetensors")
    last = load_file(newest(tmp_path / "run") / "params.safetensors")
    trained = {n: p.detach() for n, p in result_params(result).items()}
    assert same(trained, kept) and not same(trained, last)
    assert result.progress.after[metric] == values[6]


def result_params(result):
    from tsugiki import formats
    from tsugiki.adapters import attach
    return formats.load(attach(llama()), "again", result.saved).parameters()


def test_keeping_the_last_weights_keeps_the_last(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.0, 0.9, 0.1], "accuracy")
    result = go(config(tmp_path / "run", "bitfit", held=True, steps=4, eval_steps=2))
    trained = {n: p.detach() for n, p in result_params(result).items()}
    assert same(trained, load_file(newest(tmp_path / "run") / "params.safetensors"))


def test_patience_stops_after_so_many_evaluations_without_improvement(tmp_path, monkeypatch):
    scripted(monkeypatch, [9.0, 3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 1.2, 0.1], "loss")
    result = go(config(tmp_path / "run", "bitfit", held=True, steps=20, eval_steps=1, patience=3))
    assert result.progress.step == 7 and result.progress.best_step == 4 and "3 evaluations" in result.progress.stopped
    assert same({n: p.detach() for n, p in result_params(result).items()},
                load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "params.safetensors"))


def test_the_learning_rate_and_loss_of_every_step_are_in_the_metrics(tmp_path):
    go(config(tmp_path / "run", steps=10, schedule="linear", warmup=0.2, lr=0.01))
    found = left(tmp_path / "run")["metrics"]
    assert [line["step"] for line in found] == list(range(1, 11))
    assert [line["lr"] for line in found] == pytest.approx([0.005, 0.01] + [0.01 * (8 - k) / 8 for k in range(8)])
    assert all(line["supervised"] > 0 and line["norm"] > 0 for line in found) and len(lines()) == 22

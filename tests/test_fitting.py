"""What a run chooses for the machine: tokens of a forward, layers made again, compilation. None of it changes the result."""
from __future__ import annotations

import pytest
import torch
from kit import ADAPTERS, CASES, config, go, llama, metrics, result_bits, run_module
from tiny import tiny

from tsugiki.adapters import attach
from tsugiki.config import TrainConfig, build
from tsugiki.data.batch import micro_batches
from tsugiki.errors import RunError
from tsugiki.train import compiled, fitting, loop
from tsugiki.train.compiled import WORTH, compiling
from tsugiki.train.fitting import Fit, made_again, saved_bytes

CPU = torch.device("cpu")
NEAR = 1e-4                                           # of results of runs in float32 that add up in another order


def close(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


class Tight:
    """A model that has no memory for a forward of more than so many tokens."""

    def __init__(self, model, most: int):
        self.calls, self.failed, forward = [], 0, model.forward

        def limited(*args, **kwargs):
            tokens = kwargs["input_ids"].numel()
            if torch.is_grad_enabled() and tokens > most:
                self.failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            self.calls.append(tokens)
            return forward(*args, **kwargs)
        model.forward = limited


@pytest.mark.parametrize("method", ["lora+dropout", "adalora", "prefix", "full"])
def test_a_run_that_meets_a_full_memory_goes_on_in_smaller_forwards_and_loses_nothing(method, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "measured", lambda *a, **k: Fit(256))
    want, said = go(config(tmp_path / "a" / "run", method, steps=4)), []
    model = llama()
    tight = Tight(model, 70)
    found = go(config(tmp_path / "b" / "run", method, steps=4), model, said.append)
    assert tight.failed == 2 and [line for line in said if "out of memory" in line], said     # 256, 128, 64 tokens
    assert "64 tokens" in "".join(said) and found.progress.max_tokens == 64
    assert [m["loss"] for m in metrics(found.out)] == pytest.approx([m["loss"] for m in metrics(want.out)], abs=NEAR)
    assert close(result_bits(found), result_bits(want)) <= NEAR


def test_a_row_that_does_not_fit_alone_stops_the_run_and_says_what_to_do(tmp_path):
    model = llama()
    Tight(model, 3)
    with pytest.raises(RunError, match=r"step 1: there is no memory for a row of \d+ tokens alone; shorten train.max_length"):
        go(config(tmp_path / "run", steps=2), model)


def test_an_update_that_fails_is_not_taken_twice(tmp_path, monkeypatch):
    """Its first tensors may be changed already."""
    def no_room(self, closure=None):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.optim.AdamW, "step", no_room)
    with pytest.raises(RunError, match="step 1: the update failed .*out of memory"):
        go(config(tmp_path / "run", steps=2))


def test_a_forward_takes_what_memory_holds(monkeypatch):
    def fit(free, asked=None, how="auto", longest=100, **more):
        monkeypatch.setattr(fitting, "available", lambda device: free / fitting.SHARE)
        return fitting.fitting(1000.0, 10, 10.0, longest, CPU, 0, asked, how, **more)
    assert fit(1e9) == Fit(4096)                                      # more is no quicker
    assert fit(2e6) == Fit(2000)
    assert fit(1e9, asked=300) == Fit(300)
    tight = fit(6e4)                                                  # 60 tokens' worth, for rows of 100
    assert tight.tokens == 100 and 0 < tight.again < 10
    kept = (10 - tight.again) * 100 + 10 * tight.again + 100          # bytes a token
    assert 100 * kept <= 6e4 < 100 * (kept + 90)                      # no more layers than needed
    assert fit(6e4, how="off") == Fit(100)                            # as asked: it may fail, and then it says so
    assert fit(1e9, how="on") == Fit(4096, 10)
    assert fit(1.0) == Fit(100, 10)
    assert fit(1e9, how="offload") == Fit(4096, 10), "there is no other memory on a CPU"
    monkeypatch.setattr(fitting, "_may_offload", lambda device, how: how in ("auto", "offload"))
    assert fit(1.0) == Fit(100, 10, True) and fit(6e4) == tight and fit(1.0, how="on") == Fit(100, 10)
    assert fit(1e6, how="offload") == Fit(4096, 10, True) and fit(1e5, how="offload").tokens == 1000 > fit(1e5, how="on").tokens


@pytest.mark.parametrize("method", [n for n in CASES if "+" not in n])
def test_layers_made_again_in_backward_give_the_same_run(method, tmp_path):
    cfg = dict(steps=3, compile="off")
    want = go(config(tmp_path / "a" / "run", method, **cfg))
    model = llama()
    found = go(config(tmp_path / "b" / "run", method, checkpointing="on", **cfg), model)
    assert close(result_bits(found), result_bits(want)) <= 1e-6
    assert not any("forward" in layer.__dict__ for layer in model.model.layers), "the model was left changed"


def test_inputs_of_layers_that_wait_in_another_memory_give_the_same_run(tmp_path, monkeypatch):
    cfg, moved = dict(steps=3, compile="off"), []
    want = go(config(tmp_path / "a" / "run", "lora", **cfg))

    class Kept(fitting.save_on_cpu):
        def __init__(self, pinned):
            super().__init__(pinned)
            pack = self.pack_hook
            self.pack_hook = lambda t: moved.append(t.shape) or pack(t)
    monkeypatch.setattr(fitting, "save_on_cpu", Kept)
    monkeypatch.setattr(fitting, "_may_offload", lambda device, how: how == "offload")
    model, said = llama(), []
    found = go(config(tmp_path / "b" / "run", "lora", checkpointing="offload", **cfg), model, said.append)
    assert close(result_bits(found), result_bits(want)) <= 1e-6
    assert any("their inputs kept in the machine's memory" in line for line in said)
    width, layers = model.config.hidden_size, len(model.model.layers)
    inputs = [s for s in moved if s[-1] == width]
    assert len(inputs) == len(moved) and len(inputs) % layers == 0 and inputs, moved


@pytest.mark.parametrize("method", ["lora+dropout", "series", "full"])
def test_rows_filled_up_to_few_shapes_give_the_same_run(method, tmp_path, monkeypatch):
    cfg, widths, plain = dict(steps=3, compile="off", layout="pack"), [], loop.collate
    want = go(config(tmp_path / "a" / "run", method, **cfg))

    def collated(*args):
        batch = plain(*args)
        widths.append(batch.ids.shape[1])
        return batch
    monkeypatch.setattr(loop, "collate", collated)
    monkeypatch.setattr(loop, "MULTIPLE", {"cpu": 64})
    found = go(config(tmp_path / "b" / "run", method, **cfg))
    assert widths and all(w % 64 == 0 for w in widths)
    assert close(result_bits(found), result_bits(want)) <= NEAR
    assert [m["tokens"] for m in metrics(found.out)] == [m["tokens"] for m in metrics(want.out)]


def test_layers_made_again_leave_less_for_backward():
    model = tiny("llama", torch.float32)
    attach(model).add("a", ADAPTERS["lora"])
    ids = torch.arange(40)[None] + 3

    def forward():
        return model(input_ids=ids).logits
    sizes = []
    for again in (0, 1, 2):
        with made_again(model.model.layers, again):
            sizes.append(saved_bytes(forward, list(model.parameters())))
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2] > 0


def test_memory_is_measured_as_it_is_needed():
    """Twice the tokens leave twice the bytes."""
    model = tiny("llama", torch.float32)
    attach(model).add("a", ADAPTERS["lora"])
    a, b = (saved_bytes(lambda n=n: model(input_ids=torch.arange(n)[None] + 3).logits, list(model.parameters())) for n in (32, 64))
    assert 1.8 * a < b < 2.6 * a                                      # attention's own scores grow faster


def test_long_runs_compile_and_short_ones_do_not_whatever_the_clock_says(monkeypatch):
    said, layers = [], [torch.nn.Linear(2, 2) for _ in range(3)]
    monkeypatch.setattr(compiled, "_missing", lambda device: None)

    def on(wish, work):
        with compiling(layers, wish, work, CPU, said.append) as made:
            assert all((layer._compiled_call_impl is not None) == made.on for layer in layers)
            return made.on
    assert not on("auto", WORTH["cpu"] / 2) and not said
    assert on("auto", WORTH["cpu"]) and "win it back" in said.pop()
    assert on("on", 1.0) and not on("off", 1e30)
    assert all(layer._compiled_call_impl is None for layer in layers), "the model was left compiled"
    monkeypatch.setattr(compiled, "_missing", lambda device: "there is no C++ compiler (g++)")
    assert not on("auto", WORTH["cpu"]) and "no C++ compiler" in said.pop()


def test_a_run_whose_layers_cannot_be_compiled_goes_on_without_and_says_so_once(tmp_path, monkeypatch):
    class Broken(Exception):
        pass

    def compile(layer):
        def fails(*args, **kwargs):
            raise Broken("no such header: omp.h\nand more")
        layer._compiled_call_impl = fails
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    said = []
    found = go(config(tmp_path / "a" / "run", steps=3, compile="on"), say=said.append)
    monkeypatch.undo()
    want = go(config(tmp_path / "b" / "run", steps=3, compile="off"))
    assert [line for line in said if "cannot be compiled (no such header: omp.h)" in line] and len(
        [line for line in said if "cannot be compiled" in line]) == 1
    assert close(result_bits(found), result_bits(want)) == 0


@pytest.mark.parametrize("value,want", [("auto", "auto"), (True, "on"), (False, "off"), ("on", "on")])
def test_yamls_on_and_off_are_taken_for_what_they_say(value, want):
    assert build(TrainConfig, {"compile": value}).compile == want


def test_a_compiled_run_is_the_eager_run(tmp_path, monkeypatch):
    """As the layers are traced for it, by a backend that needs no C++ compiler."""
    plain, made = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: (made.append(layer), plain(layer, backend="aot_eager")))
    want, said = go(config(tmp_path / "a" / "run", "lora", steps=3, compile="off")), []
    assert not made
    model = llama()
    found = go(config(tmp_path / "b" / "run", "lora", steps=3, compile="on"), model, said.append)
    assert made == list(model.model.layers) and not [line for line in said if "cannot be compiled" in line]
    assert close(result_bits(found), result_bits(want)) <= NEAR
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_large_layers_are_cut_finer_than_small_ones():
    small, large = ([torch.nn.Linear(n, n) for _ in range(4)] for n in (64, 2048))
    assert fitting.overhead(small, CPU) == 512 and fitting.overhead(large, CPU) < 64
    lengths = [100, 100, 60, 60]
    assert micro_batches(lengths, range(4), "pad", 4096, overhead=200) == [[[0], [1], [2], [3]]]
    assert micro_batches(lengths, range(4), "pad", 4096, overhead=20) == [[[0], [1]], [[2], [3]]]

"""The plan counts what training really trains."""
import pytest
import torch
from kit import CASES, config, go, llama
from tiny import tiny

from tsugiki.adapters import attach
from tsugiki.methods import Full, LoRA
from tsugiki.plan import lora_parameters, plan
from tsugiki.sites import FAMILIES, sites

FEW = ["llama", "gpt2", "phi3", "falcon", "gpt_neox", "gemma2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A config.json without weights: what the plan needs, and all it may use."""
    made = {}
    for kind in FAMILIES:
        made[kind] = tmp_path_factory.mktemp("plan") / kind
        tiny(kind).config.save_pretrained(made[kind])
    return made


def test_the_classic_example():
    assert lora_parameters(300, 300, 2) == 1200 and 300 * 300 == 90_000
    assert lora_parameters(100, 300, 2) == lora_parameters(300, 100, 2) == 800


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("rank", [1, 6])
def test_loras_count_is_the_formula_summed_over_its_sites(kind, rank, folders):
    targeted = [s for s in sites(tiny(kind)) if s.role in ("q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down")
                and s.features is None]
    want = sum(rank * (s.d_in + s.d_out) for s in targeted)
    assert plan(str(folders[kind]), LoRA(rank=rank)).trainable == want > 0


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("name", CASES)
def test_the_plan_counts_what_a_model_really_trains(kind, name, folders):
    model, found = tiny(kind), plan(str(folders[kind]), CASES[name])
    total = sum(p.numel() for p in model.parameters())
    if isinstance(CASES[name], Full):
        assert found.trainable == found.total == total
    else:
        trained = attach(model).add("a", CASES[name]).parameters()
        assert found.trainable == sum(p.numel() for p in trained.values()) and found.total == total + found.trainable


@pytest.mark.parametrize("name", CASES)
def test_a_run_trains_as_many_parameters_as_planned(name, tmp_path):
    model = llama()
    model.config.save_pretrained(tmp_path / "base")
    want = plan(str(tmp_path / "base"), CASES[name])
    result = go(config(tmp_path / "run", name, steps=1), model)
    assert (result.trainable, result.total) == (want.trainable, want.total)


def test_memory_adds_up_and_full_fine_tuning_is_counted_in_float32(folders):
    base = str(folders["llama"])
    lora, full, part = (plan(base, cfg, width=2) for cfg in (LoRA(rank=4), Full(), Full(last=1)))
    total = sum(p.numel() for p in tiny("llama").parameters())
    assert lora.weights == total * 2 and full.weights == 0 and part.weights == (total - part.trainable) * 4
    assert lora.optimizer == lora.trainable * 16 and full.optimizer == total * 18
    for p in (lora, full, part):
        assert p.memory == p.weights + p.optimizer + p.activations == p.plain()["memory_bytes"]
    assert plan(base, LoRA(rank=4), tokens=8192).activations == pytest.approx(2 * lora.activations, rel=1e-6)
    assert lora.checkpoint == lora.trainable * 12


def test_planning_makes_no_weights(folders):
    from tsugiki.plan import skeleton
    assert all(p.device == torch.device("meta") for p in skeleton(str(folders["llama"])).parameters())

"""Products of frozen linears in float8: near to those in bfloat16, row by row, in a run; refused where they are not there."""
from __future__ import annotations

import json

import pytest
import torch
from kit import PAD, TOKENIZER, config, go, llama
from test_step import rows
from tiny import attached, tiny
from torch import nn

from tsugiki.data.batch import collate
from tsugiki.errors import UserError
from tsugiki.kernels import float8
from tsugiki.kernels.float8 import Float8, in_float8, product, rounded
from tsugiki.sites import decoder_layers
from tsugiki.train.loss import token_losses

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(float8, "SMALLEST", 0)


def test_a_product_is_that_of_the_rounded_numbers_and_a_row_is_its_own():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 96, generator=g) * torch.logspace(-3, 3, n)[:, None] for n in (40, 32))
    x = x.to(BF16)
    low, scale = rounded(w.to(BF16))
    assert low.dtype == torch.float8_e4m3fn and scale.shape == (32, 1)
    assert ((low.float() * scale - w).norm(dim=1) <= 0.04 * w.norm(dim=1)).all()
    made, want = product(x, low, scale), x.double() @ w.double().t()
    assert made.dtype == BF16 and ((made - want).norm(dim=1) <= 0.12 * x.double().norm(dim=1) * w.norm() / 96 ** 0.5).all()
    a, by = rounded(x)
    exact = (a.double() * by) @ (low.double() * scale).t()
    assert ((made - exact).norm(dim=1) <= 0.01 * exact.norm(dim=1)).all(), "more is lost than by rounding"
    assert all(torch.equal(product(x[i:i + 1], low, scale)[0], made[i]) for i in (0, 7, 39))
    x[3] = float("nan")
    x[4] = 0.0
    broken = product(x, low, scale)
    rest = [*range(3), *range(5, 40)]
    assert broken[3].isnan().all() and not broken[4].any() and torch.equal(broken[rest], made[rest])


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_near_those_of_the_frozen_linear(bias):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 48, bias), nn.Linear(20, 48)).to(BF16).requires_grad_(False)
    x, grad = torch.randn(3, 7, 64).to(BF16), torch.randn(3, 7, 48).to(BF16)
    found = []
    for inside in (False, True):
        leaf = x.clone().requires_grad_()
        if inside:
            with in_float8([layer]) as count:
                assert count == 1 and type(layer[0]) is Float8 and type(layer[1]) is nn.Linear, "20 is no multiple of 16"
                y = layer[0](leaf)
        else:
            y = layer[0](leaf)
        found.append((y, *torch.autograd.grad(y, leaf, grad)))
    assert type(layer[0]) is nn.Linear and not {"low", "turned"} & vars(layer[0]).keys()
    for a, b in zip(*found, strict=True):
        assert 0 < (a - b).norm() <= 0.06 * b.norm() and a.dtype == b.dtype


def test_a_lora_step_in_float8_is_near_the_step_in_bfloat16():
    """Losses and gradients, with the hooks of the adapter on the same modules; the base keeps its bits."""
    model, examples = tiny("llama", BF16, vocab_size=len(TOKENIZER)), rows()
    params = attached(model, "lora", scale=0.1).get("lora").parameters()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch, found = collate(examples, [[i] for i in range(8)], PAD), []
    for inside in (False, True):
        with in_float8(decoder_layers(model) if inside else []) as count:
            assert count == 14 * inside
            losses, _ = token_losses(model, batch, adapter_ids="lora")
            grads = torch.autograd.grad(losses.mean(), list(params.values()))
        found.append((losses.detach(), torch.cat([g.flatten() for g in grads]).float()))
    (a, ga), (b, gb) = found
    assert 0 < (a - b).norm() <= 0.02 * a.norm() and torch.cosine_similarity(ga, gb, 0) > 0.98
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_run_in_float8_trains_where_it_is_there_and_is_refused_in_a_line_where_not(tmp_path, monkeypatch):
    def start(name: str, method: str = "lora", **train):
        said: list[str] = []
        model = llama(BF16)
        return go(config(tmp_path / name, method, dtype="bf16", steps=3, **train), model, said.append), said, model
    with pytest.raises(UserError, match="train.float8: on needs a GPU that multiplies float8 .compute capability 8.9"):
        start("refused", float8="on")
    monkeypatch.setattr(float8, "multiplies", lambda device: True)             # torch computes it on a CPU, too, slowly
    with pytest.raises(UserError, match="train.float8: on needs a base in bf16 whose layers have frozen linears"):
        start("full", "full", float8="on")
    (want, _, _), (made, said, model) = start("plain"), start("float8", float8="on")
    assert any("linears of the base multiply in float8" in line for line in said)
    assert not any(isinstance(m, Float8) for m in model.modules())
    losses = [torch.tensor([line["loss"] for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
                            if "loss" in line and "step" in line]) for name in ("plain", "float8")]
    assert len(losses[0]) == len(losses[1]) >= 3 and 0 < (losses[0] - losses[1]).abs().max() <= 0.02 * losses[0].max()
    assert want.saved.exists() and made.saved.exists()

"""A bench for probes: tiny models made in memory, a method seated on one with an effect, and taken off again."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tsugiki.adapters import Adapter, attach
from tsugiki.edit import Config
from tsugiki.load import few_bits_options
from tsugiki.weights import dense, few_bits, write

VOCAB, WIDTH = 97, 64
EFFECT = 1e-6                                         # what an adapter must change at least, or nothing was compared
F64 = torch.float64


class No(Exception):
    """The method does not do this, and says so; the text is its reason."""


class Absent(Exception):
    """A library that the probe needs is not installed."""


class DoesNotApply(Exception):
    """There is no such question about this method."""


def tiny_base(dtype: torch.dtype) -> nn.Module:
    """A seeded Llama of two layers whose norms compute in its own dtype (transformers' round to float32)."""
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         pad_token_id=0, bos_token_id=1, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for name, norm in [(n, m) for n, m in model.named_modules() if type(m).__name__ == "LlamaRMSNorm"]:
        model.set_submodule(name, exact := nn.RMSNorm(WIDTH, norm.variance_epsilon, dtype=dtype))
        with torch.no_grad():                         # not all ones: that would hide mistakes
            exact.weight.add_(torch.randn(WIDTH, generator=generator).to(dtype) * 0.1)
    return model


def fill(params: Sequence[Tensor], seed: int = 0, scale: float = 0.1) -> None:
    """Add noise, so that an adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype) * scale)


def tokens(rows: int, length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


class Bench:
    """The tiny models, made once and used by every probe."""

    @cached_property
    def exact(self) -> nn.Module:
        return tiny_base(F64)

    @cached_property
    def replayed(self) -> nn.Module:
        """Another one for activation checkpointing, which leaves functions on layers that a compiled graph would guard."""
        return tiny_base(F64)

    @cached_property
    def single(self) -> nn.Module:
        return tiny_base(torch.float32)

    @cached_property
    def few(self) -> tuple[nn.Module, nn.Module]:
        """(a base in NF4, a plain float32 base of the weights that it multiplies with)."""
        for name in ("bitsandbytes", "accelerate"):
            if find_spec(name) is None:
                raise Absent(f"{name} is not installed; pip install 'tsugiki[quant]'")
        with tempfile.TemporaryDirectory() as folder:
            tiny_base(torch.float32).save_pretrained(folder)
            stored = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, **few_bits_options(4, torch.float32, torch.device("cpu"))).eval()
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        attach(stored)
        for name, module in stored.named_modules():
            if isinstance(module, nn.Linear) and few_bits(module):
                write(plain.get_submodule(name), dense(module).float(), module.bias)
        return stored, plain

    def forget(self) -> None:
        """Make the models anew: a probe that failed may have left anything behind."""
        for name in ("exact", "replayed", "single", "few"):
            self.__dict__.pop(name, None)


@contextmanager
def adapter(model: nn.Module, cfg: Config, noise: float = 0.1) -> Iterator[Adapter]:
    """`cfg` attached under the name "probe", with an effect; taken off at the end."""
    if not cfg.parts:
        raise DoesNotApply(f"{cfg.name} trains the model itself: there is no adapter")
    home = attach(model)
    made = home.add("probe", cfg)
    fill(list(made.parameters().values()), scale=noise)
    try:
        yield made
    finally:
        if "probe" in home.merged:
            home.unmerge("probe")
        home.remove("probe")


@contextmanager
def trained(model: nn.Module, cfg: Config) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """(what `cfg` trains, keyword arguments of a forward with it): an adapter's tensors, or the model's own."""
    if cfg.parts:
        with adapter(model, cfg) as made:
            yield made.parameters(), {"adapter_ids": "probe"}
    else:
        attach(model)
        params = cfg.select(model)
        for p in params.values():
            p.requires_grad_(True)
        try:
            yield params, {}
        finally:
            model.requires_grad_(False)


def effect(changed: Tensor, base: Tensor) -> None:
    assert apart(changed, base) > EFFECT, "the adapter changes nothing, so nothing was compared"

"""What a run will need, before it starts and without weights: one rehearsed step, by the code that trains."""
from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from tsugiki import formats
from tsugiki.adapters import Adapter, attach
from tsugiki.config import RunConfig, TrainConfig
from tsugiki.data.mixture import Mixture
from tsugiki.data.render import Example
from tsugiki.edit import Config
from tsugiki.errors import UserError
from tsugiki.evaluate.answers import room
from tsugiki.kernels.attention import by_document
from tsugiki.kernels.passes import single
from tsugiki.load import base_path, load_tokenizer, stored_dtype
from tsugiki.methods import Full
from tsugiki.rates import seconds
from tsugiki.rehearsal import Ledger
from tsugiki.sites import width as hidden_width
from tsugiki.tap import base_parameters
from tsugiki.train.log import Bar
from tsugiki.train.loop import Job, Steps
from tsugiki.train.run import freeze_but, look, route_of

LENGTH = 512                                          # tokens of a row unless told
SHORT, WHOLE = (2, 4), 8                              # layers of the two copies that stand for a model of more than WHOLE
NOTE = {"format": "pt"}                               # what the files of a result carry in their header


@dataclass(frozen=True)
class Plan:
    """One method on one base, for steps of one forward of `tokens` tokens. Sizes in bytes.

    memory = weights + optimizer + activations: what tensors hold at the peak of a step. The process holds its libraries
    besides, and what its allocator does not give back.
    """
    method: str
    total: int
    trainable: int
    weights: int                                      # all parameters and buffers, the method's own included
    optimizer: int                                    # the moments
    activations: int                                  # the rest of the peak: activations, gradients, passing copies
    saved: int                                        # the file of the result: an adapter's tensors, or a whole model's
    checkpoint: int                                   # one checkpoint of the run: its tensors and their moments
    tokens: int
    flops: int                                        # of one step
    step_seconds: float | None                        # None: not asked for
    rehearsed: bool                                   # False: copies of SHORT layers were run for real

    @property
    def memory(self) -> int:
        return self.weights + self.optimizer + self.activations

    @property
    def seconds(self) -> float | None:
        """Per 1,000 tokens."""
        return None if self.step_seconds is None else self.step_seconds * 1000 / self.tokens

    def plain(self) -> dict:
        return {"method": self.method, "total": self.total, "trainable": self.trainable, "share": self.trainable / self.total,
                "memory_bytes": self.memory, "weights_bytes": self.weights, "optimizer_bytes": self.optimizer,
                "activations_bytes": self.activations, "saved_bytes": self.saved, "checkpoint_bytes": self.checkpoint,
                "tokens": self.tokens, "flops": self.flops, "seconds_per_1000_tokens": self.seconds,
                "rehearsed": self.rehearsed}


def lora_parameters(d_in: int, d_out: int, rank: int) -> int:
    """LoRA's own count for one d_out x d_in matrix: B is d_out x r, A is r x d_in (Hu et al. 2021, section 4.1)."""
    return rank * (d_in + d_out)


def base_config(base: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The base's config.json: all that a plan reads of it."""
    try:
        read = AutoConfig.from_pretrained(base_path(base), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise UserError(f"base: {base} cannot be read: {(str(e).splitlines() or [''])[0][:200]}") from None
    if getattr(read, "quantization_config", None):
        raise UserError(f"base: {base} is stored in few bits, which plan does not count; give the base it was made from")
    return read


def plan(base: str, config: Config, *, tokens: int = 4096, length: int | None = None, trained: float = 1.0,
         dtype: torch.dtype = torch.bfloat16, device: str = "cpu", timed: bool = True, trust_remote_code: bool = False) -> Plan:
    """Rehearse a step of `config` on `base`, so every method counts itself.

    tokens: of one forward (train.max_tokens), in rows of `length` (default: 512, or what the base takes at most).
    trained: share of them that are targets, at the end of each row. timed: also measure this machine and estimate time.
    What cannot be rehearsed is run for real, on copies of 2 and 4 layers where the base has more, with drawn weights: a method
    whose shapes follow the data (EVA's ranks) may end with others. Raises UserError as the run would.
    """
    for flag, value, good in (("tokens", tokens, tokens >= 2), ("length", length, length is None or length >= 2),
                              ("trained", trained, 0 < trained <= 1)):
        if not good:
            raise UserError(f"--{flag} {value}: must be {'above 0 and at most 1' if flag == 'trained' else 'at least 2'}")
    read = base_config(base, trust_remote_code)
    width = min(length or LENGTH, tokens)
    case = _Case(config, max(1, tokens // width), width, trained, dtype, torch.device(device), stored_dtype(base), timed,
                 _tokenizer(base, trust_remote_code))
    try:
        found, rehearsed = _extended(case, read) or _count(case, read), True
    except RuntimeError:                              # torch's ways to say that a computation depends on numbers
        found, rehearsed = _run_for_real(case, read), False
    weights, optimizer = found.weights, found.optimizer
    return Plan(config.name, found.total, found.trainable, weights, optimizer, max(found.early, found.late) - weights - optimizer,
                found.saved, found.checkpoint, found.tokens, found.flops, found.seconds, rehearsed)


def counted(base: str, config: Config, trust_remote_code: bool = False) -> tuple[int, int, int]:
    """(all parameters, the trained ones, the base's hidden width), without weights and without a step."""
    read = base_config(base, trust_remote_code)
    case = _Case(config, 1, 2, 1.0, torch.float32, torch.device("cpu"), torch.float32, False, _tokenizer(base, trust_remote_code))
    try:
        with Ledger():
            made = _set_up(case, read)
            return (*_sizes(*made), hidden_width(made[0]))
    except RuntimeError:                              # its start depends on numbers
        made = _set_up(case, read)
        return (*_sizes(*made), hidden_width(made[0]))


@cache
def _tokenizer(base: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(base, trust_remote_code)
    except UserError:                                 # a method that needs one will say so
        return None


@dataclass(frozen=True)
class _Case:
    """What is rehearsed: a method, and a step's layout and precision."""
    config: Config
    rows: int
    length: int
    trained: float
    dtype: torch.dtype
    device: torch.device
    stored: torch.dtype                               # of the base on disk
    timed: bool
    tokenizer: PreTrainedTokenizerBase | None = None  # some methods start from a text

    @property
    def full(self) -> bool:
        return isinstance(self.config, Full)


@dataclass(frozen=True)
class _Count:
    """What one step counts, each number a line over the layers of a model whose layers are alike."""
    total: int
    trainable: int
    weights: int
    optimizer: int
    early: int                                        # the peak until the last gradient is there: forward and backward
    late: int                                         # the peak after it: norm, clipping, update
    saved: int
    checkpoint: int
    tokens: int
    flops: int
    seconds: float | None


def _set_up(case: _Case, read: PretrainedConfig) -> tuple[nn.Module, Adapter | None, dict[str, nn.Parameter]]:
    """(model, adapter or None, trained parameters), as a run makes them."""
    with case.device:
        model = AutoModelForCausalLM.from_config(read, dtype=torch.float32 if case.full else case.dtype).eval()
    adapter = None if case.full else attach(model).add("default", case.config, tokenizer=case.tokenizer)
    params = case.config.select(model) if adapter is None else adapter.parameters()
    freeze_but(model, params)
    return model, adapter, params


def _sizes(model: nn.Module, adapter: Adapter | None, params: dict[str, nn.Parameter]) -> tuple[int, int]:
    """(all parameters, the trained ones)."""
    trainable = sum(p.numel() for p in params.values())
    return sum(p.numel() for _, p in base_parameters(model)) + (trainable if adapter else 0), trainable


def _count(case: _Case, read: PretrainedConfig, fake: bool = True) -> _Count:
    """Set up, take one update so that the moments are there, then count a step."""
    with Ledger(fake) as ledger, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model, adapter, params = _set_up(case, read)
        stack.enter_context(by_document(model))       # both as in a run
        stack.enter_context(single(model))
        length = min(case.length, room(model) or case.length)
        job = _job(case, length, model, adapter, params)
        if adapter is not None:                       # a start made from data may change shapes
            case.config.prepare(adapter, partial(look, model, job.examples, job.cfg, 0, "default"))
            params = adapter.parameters()
            freeze_but(model, params)
            job = dataclasses.replace(job, params=params)
        steps = Steps(job, Path(folder), lambda line: None)
        gc.collect()
        weights = ledger.live
        for p in params.values():
            p.grad = torch.zeros_like(p)
        steps.optimizer.step()
        steps.optimizer.zero_grad(set_to_none=True)
        optimizer = ledger.live - weights
        for p in params.values():
            p.register_post_accumulate_grad_hook(lambda p: ledger.mark())
        ledger.begin()
        steps.step(Bar("rehearsal", 1, quiet=True))
        early, late, work, calls = ledger.early, ledger.late, ledger.work, ledger.calls
        saved = _model_bytes(model, case.stored) if case.full else _adapter_bytes(adapter)
        moments = [(f"{n}:{k}", v) for n, p in params.items() for k, v in steps.optimizer.state[p].items()]
        checkpoint, sizes = file_bytes(job.tensors.items()) + file_bytes(moments), _sizes(model, adapter, params)
    took = seconds(work, calls, case.device, case.dtype) if case.timed else None
    return _Count(*sizes, weights, optimizer, early, late, saved, checkpoint, case.rows * length,
                  sum(w.flops for w in work.values()), took)


def _job(case: _Case, length: int, model: nn.Module, adapter: Adapter | None, params: dict[str, nn.Parameter]) -> Job:
    """A training job of one step on equal rows, the last tokens of each trained."""
    rows, vocabulary = case.rows, model.get_input_embeddings().weight.shape[0]
    first = length - max(1, round(case.trained * (length - 1)))
    examples = [Example([(31 * r + 7 * t) % vocabulary for t in range(length)], [t >= first for t in range(length)], f"row {r}")
                for r in range(rows)]
    cfg = RunConfig(train=TrainConfig(batch_size=rows, max_length=length, max_tokens=rows * length, steps=1))
    mixed = case.full and case.dtype == torch.bfloat16
    more = {"autocast": partial(torch.autocast, case.device.type, torch.bfloat16)} if mixed else {}
    return Job(model, params, examples, cfg.train, case.config.lr, 0, "pad", Mixture.alone(rows, rows, 0),
               route=route_of(cfg, adapter), adapter=adapter, **more)


def file_bytes(tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None) -> int:
    """Size of the safetensors file of these tensors, to the byte: a length, a header padded to 8, the data."""
    codes = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in sorted(tensors, key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        code = codes.get(tensor.dtype, f"{'BOOL' if tensor.dtype == torch.bool else f'I{8 * tensor.element_size()}'}")
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + end


def _adapter_bytes(adapter: Adapter) -> int:
    """Size of an adapter's file; the most it can be where what is written depends on numbers (AdaLoRA's kept directions)."""
    try:
        return file_bytes(formats.contents(adapter)[2].items(), NOTE)
    except RuntimeError:
        return file_bytes(adapter.tensors().items(), NOTE)


def _model_bytes(model: nn.Module, stored: torch.dtype) -> int:
    """Size of a whole model's file in `stored`, what is tied written once."""
    kept = {id(p): (n, p) for n, p in model.state_dict(keep_vars=True).items()}
    return file_bytes(((n, torch.empty(p.shape, dtype=stored if p.is_floating_point() else p.dtype, device="meta"))
                       for n, p in kept.values()), NOTE)


def _shortened(read: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same base with fewer layers."""
    read = type(read).from_dict(read.to_dict())
    if isinstance(kinds := getattr(read, "layer_types", None), list):
        read.layer_types = kinds[:layers]             # never more layers than there are
    read.num_hidden_layers = layers
    return read


def _extended(case: _Case, read: PretrainedConfig) -> _Count | None:
    """The count of a model of many layers from two copies of few; None where its layers, or the method's way with them,
    are not alike: then the sizes of the whole model do not lie on the line through the copies'."""
    if read.num_hidden_layers <= WHOLE or len(set(getattr(read, "layer_types", None) or ())) > 1:
        return None
    try:
        found = _line(read, *(_count(case, _shortened(read, n)) for n in SHORT))
    except UserError:                                 # it names a layer that the copies lack
        return None
    with Ledger():
        whole = _sizes(*_set_up(case, read))
    return found if whole == (found.total, found.trainable) else None


def _run_for_real(case: _Case, read: PretrainedConfig) -> _Count:
    """The same count from a step with numbers, of the model itself if it has few layers, else of two copies of few."""
    if read.num_hidden_layers <= SHORT[1]:
        return _count(case, read, fake=False)
    return _line(read, *(_count(case, _shortened(read, n), fake=False) for n in SHORT))


def _line(read: PretrainedConfig, few: _Count, more: _Count) -> _Count:
    """The count of all layers, by the line through those of SHORT layers."""
    far, values = (read.num_hidden_layers - SHORT[0]) / (SHORT[1] - SHORT[0]), {}
    for name, a in vars(few).items():
        step = 0 if a is None else (getattr(more, name) - a) * far
        values[name] = a + step if isinstance(a, float) else a if a is None else a + round(step)
    return _Count(**values)

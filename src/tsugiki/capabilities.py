"""What each method can do, found by doing it on a tiny model: nothing here is written down by hand."""
from __future__ import annotations

import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.adapters import attach
from tsugiki.bench import Absent, Bench, DoesNotApply, No, adapter, apart, effect, fill, tokens, trained
from tsugiki.combine import convert
from tsugiki.edit import Config
from tsugiki.errors import UserError, nearest
from tsugiki.formats.disk import CONFIG
from tsugiki.load import base_path, stored_dtype
from tsugiki.methods import METHODS, LoRA
from tsugiki.sites import decoder_layers, width

EXACT = 1e-9                                          # float64: how near two ways of computing the same must be
CLOSE = 1e-4                                          # float32, where two sums run in another order


@dataclass(frozen=True)
class Answer:
    """says: "yes", "no" (refused), "FAILS" (wrong, or an error that is no refusal), "not installed", or "-" (does not apply)."""
    says: str
    why: str = ""                                     # the refusal, the error, or a remark
    difference: float | None = None                   # largest difference of the two ways compared


@dataclass(frozen=True)
class Found:
    """What a probe that succeeded has to say."""
    difference: float
    remark: str = ""


def within(difference: float, limit: float, what: str) -> float:
    assert difference <= limit, f"{what} differ by {difference:.2g}"
    return difference


# The probes. Each returns what it measured, raises UserError or No where the method refuses, and anything else where it fails.

def merge(bench: Bench, cfg: Config) -> Found:
    model, x = bench.exact, tokens(2)
    with adapter(model, cfg) as made:
        alive = model(x, adapter_ids="probe").logits
        effect(alive, model(x, adapter_ids=()).logits)
        made.home.merge("probe")
        return Found(within(apart(model(x, adapter_ids="probe").logits, alive), EXACT, "merged and unmerged logits"))


def unmerge(bench: Bench, cfg: Config) -> Found:
    model = bench.single
    with adapter(model, cfg) as made:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        made.home.merge("probe")
        assert not _same(model.state_dict(), before), "merging changed nothing"
        made.home.unmerge("probe")
        assert _same(model.state_dict(), before), "the bits are not those from before"
    return Found(0.0)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def mixed(bench: Bench, cfg: Config) -> Found:
    model, x, who = bench.exact, tokens(4), ["probe", "other", None, "probe"]
    with adapter(model, cfg) as made:
        home = made.home
        fill(list(home.add("other", LoRA(rank=2)).parameters().values()), seed=1)
        try:
            together = model(x, adapter_ids=who).logits
            effect(together[0], model(x[:1], adapter_ids=()).logits[0])
            alone = torch.cat([model(x[i:i + 1], adapter_ids=[name]).logits for i, name in enumerate(who)])
        finally:
            home.remove("other")
    return Found(within(apart(together, alone), EXACT, "rows in a batch and alone"))


def packed(bench: Bench, cfg: Config) -> Found:
    model, first, second = bench.exact, tokens(1, 6), tokens(1, 5, seed=1)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with trained(model, cfg) as (_, route):
        row = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False, **route).logits
        alone = [model(x, use_cache=False, **route).logits for x in (first, second)]
    return Found(within(apart(row, torch.cat(alone, 1)), EXACT, "packed and separate documents"))


def gradients(model: nn.Module, params: dict[str, Tensor], route: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients) of one batch. Raises where a trained tensor has none."""
    x = tokens(2)
    with torch.enable_grad():
        loss = model(x, labels=x, use_cache=False, **route).loss
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    missing = [k for k, g in zip(params, found, strict=True) if g is None]
    assert not missing, f"{missing[0]} gets no gradient"
    assert any(g.abs().max() > 0 for g in found), "every gradient is zero"
    return loss.detach(), dict(zip(params, found, strict=True))


def checkpointing(bench: Bench, cfg: Config) -> Found:
    model = bench.replayed.train()
    try:
        with trained(model, cfg) as (params, route):
            _, plain = gradients(model, params, route)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            _, again = gradients(model, params, route)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    return Found(within(max(apart(plain[k], again[k]) for k in plain), EXACT, "gradients with and without checkpointing"))


def compiled(bench: Bench, cfg: Config) -> Found:
    model, x, graphs = bench.exact, tokens(2), []
    layers = decoder_layers(model)

    def backend(graph: Any, inputs: Any) -> Callable:
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    with trained(model, cfg) as (_, route):
        eager = model(x, use_cache=False, **route).logits
        try:
            layers[0].compile(fullgraph=True, backend=backend)
            model(x, use_cache=False, **route)
            first = len(graphs)                       # more than one where the layer's own output is edited: a hook is a graph
            for layer in layers[1:]:
                layer.compile(fullgraph=True, backend=backend)
            whole = model(x, use_cache=False, **route).logits
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
            torch._dynamo.reset()
    difference = within(apart(whole, eager), EXACT, "compiled and eager layers")
    assert graphs, "nothing was compiled"
    assert len(graphs) == first, f"{len(graphs)} graphs for {len(layers)} layers, {first} for the first"
    return Found(difference, f"{first} graph{'s' * (first > 1)} for all {len(layers)} layers")


def four_bits(bench: Bench, cfg: Config) -> Found:
    few, plain = bench.few
    if not cfg.parts:
        names, every = cfg.select(few).keys(), dict(few.named_parameters())
        if frozen := [n for n, p in every.items() if n not in names and not p.is_floating_point()]:
            raise No(f"it trains the model itself, and cannot train the {len(frozen)} matrices that are stored in few bits")
    before = {k: v.clone() for k, v in few.state_dict().items()}
    with adapter(few, cfg, 0.02) as made, adapter(plain, cfg, 0.02) as twin:
        for name, tensor in twin.tensors().items():   # a start made from the base's weights may differ in its last bits
            tensor.copy_(made.tensors()[name])
        loss, found = gradients(few, made.parameters(), {"adapter_ids": "probe"})
        right, want = gradients(plain, twin.parameters(), {"adapter_ids": "probe"})
    assert _same(few.state_dict(), before), "a bit of the base changed"
    within(apart(loss, right), CLOSE, "losses on few bits and on their dequantised weights")
    worst = max(apart(found[k], want[k]) / (float(want[k].abs().max()) + 1e-3) for k in want)
    return Found(within(worst, 10 * CLOSE, "gradients on few bits and on their dequantised weights"))


def peft(bench: Bench, cfg: Config) -> Found:
    """At the default settings; where PEFT has no words for them, at the others that the method declares."""
    found = [_saved(bench, cfg)]
    for values in type(cfg).variants if cfg.peft is not None and found[0][0] is None else ():
        found.append(_saved(bench, type(cfg)(**values)))
        if found[-1][0] is not None:
            return Found(found[-1][1], f"{found[-1][0]}, with " + ", ".join(f"{k}={v}" for k, v in values.items()))
    if found[0][0] is None:
        raise No("saved with Tsugiki's own keys" + ("" if cfg.peft is None else ": PEFT has no words for these settings"))
    return Found(found[0][1], found[0][0])


def _saved(bench: Bench, cfg: Config) -> tuple[str | None, float]:
    """(PEFT's name of the method in the adapter's folder, how far the adapter read from there is)."""
    model, x = bench.single, tokens(2)
    with tempfile.TemporaryDirectory() as folder, adapter(model, cfg) as made:
        home = made.home
        want = model(x, adapter_ids="probe").logits
        effect(want, model(x, adapter_ids=()).logits)
        home.save("probe", Path(folder) / "a")
        kind = json.loads((Path(folder) / "a" / CONFIG).read_text(encoding="utf-8")).get("peft_type")
        home.load("again", Path(folder) / "a")
        try:
            return kind, within(apart(model(x, adapter_ids="again").logits, want), CLOSE, "saved and loaded logits")
        finally:
            home.remove("again")


def as_lora(bench: Bench, cfg: Config) -> Found:
    model, x = bench.exact, tokens(2)
    with adapter(model, cfg) as made:
        want = model(x, adapter_ids="probe").logits
        done = convert(made.home, "probe", "lora")
        try:
            difference = apart(model(x, adapter_ids="lora").logits, want)
        finally:
            made.home.remove("lora")
    return Found(within(difference, EXACT, "logits of the method and of its LoRA"), f"rank {done.rank}")


def identity(bench: Bench, cfg: Config) -> Found:
    model, x = bench.single, tokens(2)
    with adapter(model, cfg, noise=0.0) as made:
        base, new = model(x, adapter_ids=()).logits, model(x, adapter_ids="probe").logits
        promised = all(edit.starts_as_identity for _, edit in made.edits.values())
    if not torch.equal(base, new):
        assert not promised, f"a new adapter changes logits by {apart(base, new):.2g}"
        raise No("a new adapter changes the model a little")
    return Found(0.0)


def cached(bench: Bench, cfg: Config) -> Found:
    model, x = bench.exact, tokens(2, 6)
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
                   attention_mask=torch.ones_like(x))
    with trained(model, cfg) as (_, route):
        on, off = (model.generate(x, use_cache=use, **options, **route) for use in (True, False))
    assert torch.equal(on.sequences, off.sequences), "other tokens with the cache"
    return Found(within(apart(torch.stack(on.logits), torch.stack(off.logits)), EXACT, "logits with and without the cache"))


@dataclass(frozen=True)
class Property:
    head: str                                         # of its column
    means: str
    probe: Callable[[Bench, Config], Found]


PROPERTIES: dict[str, Property] = {
    "merge": Property("merge", "folded into the base's weights the logits are the same, in float64 to 1e-9", merge),
    "unmerge": Property("unmerge", "taken out again, the base has its original bits", unmerge),
    "mixed": Property("mixed", "in one batch with other adapters each row is as alone, to 1e-9", mixed),
    "packed": Property("packed", "documents packed into one row are as alone, to 1e-9", packed),
    "checkpointing": Property("ckpt", "activation checkpointing leaves the gradients as they are, to 1e-9", checkpointing),
    "compile": Property("compile", "layers compile whole, what is compiled for one serves all, equal to eager to 1e-9", compiled),
    "few": Property("4-bit", "trains on an NF4 base as on its dequantised weights, to 1e-3 of the largest gradient, and no bit of "
                    "the base changes", four_bits),
    "peft": Property("PEFT", "saved in Hugging Face PEFT's own format; loaded again it is the same to 1e-4", peft),
    "lora": Property("to LoRA", "turned into a LoRA (of as high a rank as it takes) its logits are the same, to 1e-9", as_lora),
    "identity": Property("identity", "a new adapter changes no bit of the logits", identity),
    "cache": Property("cache", "generating with the cache gives the logits of generating without, to 1e-9", cached),
}


def probe(bench: Bench, cfg: Config, key: str) -> Answer:
    """One question about one method. Never raises: an error that is no refusal is an answer of its own."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")           # transformers renames what it checkpoints with
            found = PROPERTIES[key].probe(bench, cfg)
        return Answer("yes", found.remark, found.difference)
    except (UserError, No) as e:
        return Answer("no", str(e))
    except DoesNotApply as e:
        return Answer("-", str(e))
    except Absent as e:
        return Answer("not installed", str(e))
    except Exception as e:
        bench.forget()
        return Answer("FAILS", f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}")


def capabilities(names: Sequence[str] = (), properties: Sequence[str] = (), *,
                 tell: Callable[[int, int, str], None] = lambda done, total, what: None) -> dict[str, dict[str, Answer]]:
    """method -> property -> answer, for these methods (default: all) and properties (all), at each method's default settings.

    tell(done, total, what) is called after each probe. Raises UserError for a name that is not known.
    """
    bench, keys, names, done = Bench(), tuple(properties or PROPERTIES), tuple(names or METHODS), 0
    for name, known, what in [(n, METHODS, "method") for n in names] + [(k, PROPERTIES, "property") for k in keys]:
        if name not in known:
            raise UserError(f"no {what} is called {name!r}{nearest(name, known)} (there are: {' '.join(known)})")
    found: dict[str, dict[str, Answer]] = {}
    for name in names:
        for key in keys:
            found.setdefault(name, {})[key] = probe(bench, METHODS[name](), key)
            tell(done := done + 1, len(names) * len(keys), f"{name}: {PROPERTIES[key].head}")
    return found


@dataclass(frozen=True)
class Size:
    """Of one method on one base, counted on tensors without storage."""
    trainable: int
    file: int                                         # bytes of the tensors that are saved: of the adapter, or of the whole model
    rate: float                                       # the learning rate to start from on this base


def size(base: str, cfg: Config, trust_remote_code: bool = False) -> Size:
    """Attach `cfg` to the base's shapes and count. Raises UserError for a base that cannot be read or takes no such method."""
    try:
        read = AutoConfig.from_pretrained(base_path(base), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise UserError(f"base: {base} cannot be read: {(str(e).splitlines() or [''])[0][:200]}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read)
    rate = cfg.rate(width(model))
    if not cfg.parts:
        whole = sum(p.numel() for p in model.parameters())
        return Size(sum(p.numel() for p in cfg.select(model).values()), whole * stored_dtype(base).itemsize, rate)
    made = attach(model).add("count", cfg)
    _, kept = cfg.stored(made)
    return Size(sum(p.numel() for p in made.parameters().values()), sum(t.numel() * t.element_size() for t in kept.values()), rate)


def about(cls: type[Config]) -> tuple[str, str]:
    """(title, what it trains) of a method, from the first paragraph of its docstring: "Title. Sentence." or "Title: sentence"."""
    text = " ".join(inspect.cleandoc(cls.__doc__ or cls.name).partition("\n\n")[0].split())
    title, _, rest = re.sub(r"[.:] ", "\n", text, count=1).partition("\n")
    return title.rstrip("."), re.split(r"\. (?=[A-Z])", rest)[0].rstrip(".")

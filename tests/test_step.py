"""One optimizer step: however it is cut into forwards it is the same step; what is not finite never reaches the weights."""
import random
from contextlib import nullcontext

import pytest
import torch
from kit import ADAPTERS, CASES, PAD, TOKENIZER, llama, trainable
from tiny import EXACT, LOOSER, difference, fill, fit, tiny

from tsugiki.adapters import attach
from tsugiki.config import TrainConfig
from tsugiki.data.batch import IGNORE, collate, micro_batches
from tsugiki.data.render import Example
from tsugiki.errors import RunError, UserError
from tsugiki.methods import BitFit, Full, LoRA
from tsugiki.route import token_keys
from tsugiki.sites import FAMILIES
from tsugiki.train.layout import arranged, packs
from tsugiki.train.loss import token_losses
from tsugiki.train.optim import adamw, grad_norm, schedule
from tsugiki.train.step import train_step

F64 = torch.float64
WAYS = {"8x1": [[i] for i in range(8)], "4x2": [[0, 1], [2, 3], [4, 5], [6, 7]], "1x8": [list(range(8))]}


def rows(silent: tuple[int, ...] = (3,), n: int = 8) -> list[Example]:
    """Unequal lengths; the rows of `silent` have no target."""
    rng = random.Random(5)
    made = []
    for i in range(n):
        size = rng.randint(3, 17)
        trained = [False] + [(rng.random() < 0.5 or j == size - 1) and i not in silent for j in range(1, size)]
        made.append(Example([rng.randint(20, 400) for _ in range(size)], trained, f"rows.jsonl:{i + 1}"))
    return made


def step(cfg, batches, examples, *, kind="llama", clip=1.0, number=1, lr=1e-3, break_it=lambda model, params: None):
    """(result, parameters after) of one step of `cfg` on a float64 model, from weights with an effect."""
    model = llama(F64, kind)
    params, name = trainable(model, cfg)
    if name:
        fill(attach(model).get(name), seed=3)
    break_it(model, params)
    before = {n: p.detach().clone() for n, p in params.items()}

    def route(batch):
        if name is None:
            return {}
        return {"adapter_ids": name, "token_keys": token_keys(0, number, batch.samples, batch.positions)}
    optimizer = adamw(params, lr, 0.0, 0.999)
    try:
        result = train_step(model, batches, params, optimizer, clip=clip, step=number, route=route,
                            where=lambda i: examples[i].where)
    except RunError as e:
        return e, before, params
    return result, before, {n: p.detach() for n, p in params.items()}


def cut(examples, groups):
    return [collate(examples, [[i] for i in group], PAD) for group in groups]


@pytest.mark.share(2)
@pytest.mark.parametrize("name", CASES)
def test_every_way_of_accumulating_gives_the_same_step(name):
    examples = rows()
    want, before, after = step(CASES[name], cut(examples, WAYS["1x8"]), examples)
    assert want.supervised == sum(map(sum, (e.trained for e in examples))) and want.tokens == sum(len(e.ids) for e in examples)
    assert max(difference(before[n], after[n]) for n in after) > 1e-5, "the step changed nothing"
    for way in ("8x1", "4x2"):
        got, _, params = step(CASES[name], cut(examples, WAYS[way]), examples)
        assert abs(got.loss - want.loss) <= EXACT and abs(got.norm - want.norm) <= EXACT * max(1, want.norm)
        assert max(difference(params[n], after[n]) for n in params) <= EXACT, way
        assert (got.supervised, got.tokens) == (want.supervised, want.tokens)


@pytest.mark.share(3)
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not any(part.edit.virtual for part in c.parts)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_padded_and_packed_rows_give_the_same_step(name, kind):
    examples = rows()
    lengths = [len(e.ids) for e in examples]
    assert packs(llama(F64, kind))
    want, _, after = step(CASES[name], cut(examples, WAYS["8x1"]), examples, kind=kind)
    packed = [collate(examples, f, PAD) for f in micro_batches(lengths, range(8), "pack", 40)]
    assert all(b.packed for b in packed[:1]) and len(packed) < 8
    got, _, params = step(CASES[name], packed, examples, kind=kind)
    assert abs(got.loss - want.loss) <= EXACT
    assert max(difference(params[n], after[n]) for n in params) <= EXACT


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if any(part.edit.virtual for part in c.parts)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "phi3"])
def test_virtual_tokens_are_packed_with_their_documents(name, kind):
    """Losses and gradients are those of padded rows, in which the forward makes room; so are random draws."""
    examples, cfg = rows(), CASES[name]
    model = llama(F64, kind)
    adapter = fill(attach(model).add("a", fit(attach(model), cfg)), seed=2)
    lengths = [len(e.ids) + adapter.virtual for e in examples]
    placed = bool(model.adapters.placed)
    with arranged(model, examples, TrainConfig(), virtual=True) as layout:
        assert layout == ("pad" if placed else "pack")
        if placed:
            return
        packed = [collate(examples, f, PAD, 8, adapter.virtual) for f in micro_batches(lengths, range(8), "pack", 90)]
        assert packed[0].packed and len(packed) < 8 and sum(b.tokens for b in packed) == sum(len(e.ids) for e in examples)
        found = []
        for batches in (packed, [collate(examples, [[i] for i in range(8)], PAD)]):
            losses, of = zip(*(token_losses(model, b, adapter_ids="a", token_keys=token_keys(7, 3, b.samples, b.positions))
                               for b in batches), strict=True)
            losses, of = torch.cat(losses), torch.cat(of)
            order = of.argsort(stable=True)
            params = list(adapter.parameters().values())
            found.append((losses[order].detach(), of[order], *torch.autograd.grad(losses.sum(), params)))
    for a, b in zip(*found, strict=True):
        assert difference(a, b) <= LOOSER.get(kind, 1e-11) * max(1, float(b.abs().max())) and b.abs().max() > 0


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_the_gradient_of_packed_virtual_tokens_is_summed_once_and_not_document_after_document(name):
    """In bfloat16 a sum of three hundred stops growing at 256."""
    examples = [Example([5 + i % 90, 6, 7], [False, True, True], f"row {i}") for i in range(300)]
    model = llama(torch.bfloat16)
    adapter = fill(attach(model).add("a", CASES[name]), seed=2)
    found = []
    with arranged(model, examples, TrainConfig(), virtual=True) as layout:
        assert layout == "pack"
        for cut_, room in (([list(range(300))], adapter.virtual), ([[i] for i in range(300)], 0)):
            batch = collate(examples, cut_, PAD, virtual=room)
            losses, _ = token_losses(model, batch, adapter_ids="a")
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), list(adapter.parameters().values()))]))
    packed, padded = found
    assert (packed - padded).norm() <= 0.03 * padded.norm() and abs(packed.norm() / padded.norm() - 1) <= 0.005


def test_virtual_tokens_are_not_packed_where_attention_is_not_told_of_documents():
    examples = rows()
    for kind, more in (("falcon", {}), ("mistral", {"sliding_window": 32})):
        model = tiny(kind, F64, vocab_size=len(TOKENIZER), **more)
        attach(model).add("a", CASES["prefix"])
        with arranged(model, examples, TrainConfig(), virtual=True) as layout:
            assert layout == "pad", kind
        with pytest.raises(UserError, match="pack is not exact here .the method adds virtual tokens"), \
                arranged(model, examples, TrainConfig(layout="pack"), virtual=True):
            pass
    model = llama(F64)
    attach(model).add("a", CASES["prefix"]), attach(model).add("b", CASES["lora"])
    batch = collate(examples, [[0, 1, 2]], PAD, virtual=3)
    for who in ("b", ("a", "b")):
        with pytest.raises(UserError, match="virtual_slots") if who == "b" else nullcontext():
            token_losses(model, batch, adapter_ids=who)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_loss_is_that_of_all_logits_for_every_method_and_family(kind):
    """The head runs on trained positions only: the same numbers as from every position's logits."""
    examples = rows()
    model = llama(F64, kind)
    batch = collate(examples, [[i] for i in range(8)], PAD)
    at = batch.targets >= 0
    labels = torch.nn.functional.pad(batch.targets[:, :-1], (1, 0), value=IGNORE)       # some methods must know where prompts end
    for name, cfg in ADAPTERS.items():
        fill(attach(model).add(name.replace("+", "."), fit(attach(model), cfg)), seed=2)
    for name in attach(model).names():
        with torch.no_grad():
            losses, of = token_losses(model, batch, adapter_ids=name)
            logits = model(batch.ids, adapter_ids=name, use_cache=False, labels=labels).logits
        want = torch.nn.functional.cross_entropy(logits[at], batch.targets[at], reduction="none")
        assert difference(losses, want) <= LOOSER.get(kind, EXACT) and torch.equal(of, batch.samples[at]), name


def test_dropout_draws_another_mask_each_step_and_the_same_one_again():
    examples = rows()
    cfg, batches = LoRA(rank=4, dropout=0.3), cut(examples, WAYS["4x2"])
    first, second, again = (step(cfg, batches, examples, number=n)[0].loss for n in (1, 2, 1))
    assert first == again and abs(first - second) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_rows_of_which_nothing_is_trained_stop_the_run(name):
    examples = rows(silent=tuple(range(8)))
    for number in (1, 2):
        error, before, params = step(CASES[name], cut(examples, WAYS["4x2"]), examples, number=number)
        assert isinstance(error, RunError) and f"step {number}" in str(error) and "rows.jsonl:1" in str(error)
        assert all(torch.equal(before[n], params[n]) for n in params)


def nan_token(model, params):
    """A weight of one token's embedding is NaN; only rows that hold the token notice."""
    with torch.no_grad():
        model.get_input_embeddings().weight[rows()[5].ids[0], 0] = float("nan")


def inf_weight(model, params):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("down_proj.weight"))[0, 0] = float("inf")


def bad_gradient(model, params):
    """Finite loss, infinite gradient."""
    next(iter(params.values())).register_hook(lambda g: g * float("inf"))


@pytest.mark.parametrize("name", CASES)
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_row(name):
    examples = rows(silent=())
    used = [i for i, e in enumerate(examples) if rows()[5].ids[0] in e.ids]
    assert used == [5]
    error, before, params = step(CASES[name], cut(examples, WAYS["4x2"]), examples, number=7, break_it=nan_token)
    assert isinstance(error, RunError) and "step 7" in str(error) and "rows.jsonl:6" in str(error)
    assert all(f"rows.jsonl:{i + 1}" not in str(error) for i in range(8) if i != 5), "rows without fault were named"
    assert all(torch.equal(torch.nan_to_num(before[n]), torch.nan_to_num(p.detach())) for n, p in params.items())
    assert all(p.grad is None for p in params.values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fault", [inf_weight, bad_gradient])
def test_infinite_weights_and_gradients_stop_before_the_update(name, fault):
    examples = rows(silent=())
    error, before, params = step(CASES[name], cut(examples, WAYS["1x8"]), examples, number=4, break_it=fault)
    assert isinstance(error, RunError) and str(error).startswith("step 4:") and "rows.jsonl:" in str(error)
    if fault is bad_gradient:
        assert next(iter(params)) in str(error)
    assert all(torch.equal(before[n], p.detach()) for n, p in params.items())
    assert "\n" not in str(error) and all(p.grad is None for p in params.values())


def test_a_trained_tensor_that_gets_no_gradient_stops_the_first_step():
    examples = rows()
    model = llama(F64)
    params, _ = trainable(model, LoRA(rank=4))
    params["lost.A"] = torch.nn.Parameter(torch.ones(2, dtype=F64))
    before = {n: p.detach().clone() for n, p in params.items()}
    with pytest.raises(RunError, match=r"step 1: .*lost\.A"):
        train_step(model, cut(examples, WAYS["4x2"]), params, adamw(params, 1e-3, 0.0, 0.999), clip=1.0, step=1,
                   where=lambda i: "", route=lambda b: {"adapter_ids": "a"})
    assert all(torch.equal(before[n], p) for n, p in params.items())


def test_clipping_scales_the_whole_gradient_to_the_limit():
    examples = rows()
    batches = cut(examples, WAYS["4x2"])

    def moved(clip):                                   # plain SGD, so that the change is the gradient
        model = llama(F64)
        params, name = trainable(model, LoRA(rank=4))
        fill(attach(model).get(name), seed=3)
        before = {n: p.detach().clone() for n, p in params.items()}
        result = train_step(model, batches, params, torch.optim.SGD(params.values(), lr=1.0), clip=clip, step=1,
                            where=lambda i: "", route=lambda b: {"adapter_ids": name})
        return result, torch.cat([(before[n] - p.detach()).flatten() for n, p in params.items()])
    free, g = moved(0.0)
    assert abs(float(g.norm()) - free.norm) <= 1e-12 * free.norm and free.norm > 0.1
    small, clipped = moved(free.norm / 10)
    assert abs(float(clipped.norm()) - free.norm / 10) < 1e-12 and difference(clipped * 10, g) < 1e-12
    assert small.norm == free.norm
    assert torch.equal(moved(free.norm * 2)[1], g)


def test_only_matrices_are_decayed():
    model = llama(F64)
    params, _ = trainable(model, Full())
    optimizer = adamw(params, 1e-2, 0.5, 0.999)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in params.values() if p.dim() >= 2} == {0.5}
    assert {decay[id(p)] for p in params.values() if p.dim() < 2} == {0.0}
    before = {n: p.detach().clone() for n, p in params.items()}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in params.items():
        assert difference(p.detach(), before[n] * (1 - 1e-2 * 0.5 if p.dim() >= 2 else 1)) < 1e-15, n
    vectors, _ = trainable(llama(F64), BitFit())
    assert [g["weight_decay"] for g in adamw(vectors, 1e-2, 0.5, 0.999).param_groups] == [0.0]


def test_schedules_have_their_values():
    line = [schedule("linear", s, 10, 0.2) for s in range(10)]
    assert line == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    wave = [schedule("cosine", s, 8, 0.0) for s in range(8)]
    assert wave[0] == 1.0 and wave[4] == pytest.approx(0.5) and wave[2] == pytest.approx(0.8535533905932737)
    assert all(a > b for a, b in zip(wave, wave[1:], strict=False)) and 0 < wave[-1] < 0.05
    assert [schedule("constant", s, 6, 0.5) for s in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert schedule("cosine", 0, 1, 0.03) == 1.0 and schedule("linear", 4, 5, 1.0) == 1.0


def test_the_gradient_norm_is_summed_in_float64():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1e25, 1e25, 0.0])           # the squares overflow float32
    q = torch.nn.Parameter(torch.zeros(1))
    assert float(grad_norm([p, q])) == pytest.approx(2**0.5 * 1e25)

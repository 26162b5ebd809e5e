"""Scores: each equals a plain recomputation, one row at a time, whatever the batches."""
import math
from dataclasses import replace

import pytest
import torch
from kit import ADAPTERS, PAD, TOKENIZER, lines, llama, write
from tiny import EXACT, fill
from tokenizers_tiny import STYLES, styled
from torch.nn import functional as F

from tsugiki.adapters import attach
from tsugiki.config import EvalConfig
from tsugiki.data import Conversation, Message, Renderer, load_conversations
from tsugiki.errors import RunError, UserError
from tsugiki.evaluate.answers import generate_answers, room
from tsugiki.evaluate.score import bleu, evaluate, pick_metric, row_losses, wilson

F64 = torch.float64


def rows(tmp_path, n=13, **more):
    return load_conversations([write(tmp_path / "rows.jsonl", lines(n))], **more)


def score(model, conversations, tokenizer=TOKENIZER, max_length=128, **cfg):
    return evaluate(model, Renderer(tokenizer), conversations, EvalConfig(**{"max_new_tokens": 5} | cfg), PAD, max_length)


def plain_loss(model, example) -> tuple[float, int]:
    """Sum of one row's losses and its targets, from all logits of that row alone."""
    with torch.no_grad():
        labels = [token if trained else -100 for token, trained in zip(example.ids, example.trained, strict=True)]
        logits = model(torch.tensor([example.ids]), labels=torch.tensor([labels])).logits[0]
    losses = F.cross_entropy(logits[:-1], torch.tensor(example.ids[1:]), reduction="none")
    kept = losses[torch.tensor(example.trained[1:])]
    return float(kept.sum()), len(kept)


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_the_loss_is_that_of_every_row_alone(name, tmp_path):
    model, conversations = llama(F64), rows(tmp_path)
    adapters = attach(model)
    if name:
        fill(adapters.add("a", ADAPTERS[name]), seed=2)
    renderer = Renderer(TOKENIZER)
    examples, _ = renderer.examples(conversations, 128)
    with adapters.use("a" if name else None):
        each = [plain_loss(model, e) for e in examples]
        sums, counts = row_losses(model, examples, PAD, max_tokens=60)
        found = score(model, conversations, metric="loss")
    assert max(abs(float(s) - want) for s, (want, _) in zip(sums, each, strict=True)) <= EXACT * 10
    assert counts.tolist() == [n for _, n in each]
    assert abs(found.loss - sum(s for s, _ in each) / sum(n for _, n in each)) <= EXACT
    assert found.value == found.loss and found.n == 13 and found.plain()["perplexity"] == pytest.approx(math.exp(found.loss))


def test_an_adapter_changes_the_score(tmp_path):
    model, conversations = llama(F64), rows(tmp_path)
    adapters = attach(model)
    fill(adapters.add("a", ADAPTERS["lora"]), seed=2)
    with adapters.use(None):
        base = score(model, conversations, metric="loss").loss
    assert abs(score(model, conversations, metric="loss").loss - base) > 1e-3


@pytest.mark.share(2)
@pytest.mark.parametrize("name", ADAPTERS)
def test_answers_are_those_generated_one_by_one_in_any_batch(name, tmp_path):
    model, conversations = llama(F64), rows(tmp_path)
    fill(attach(model).add("a", ADAPTERS[name]), seed=4, scale=0.02)
    renderer = Renderer(TOKENIZER)
    alone = []
    for c in conversations:
        ids = torch.tensor([renderer.prompt(c)])
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                                 eos_token_id=list(renderer.stop_ids), pad_token_id=PAD)
        alone.append(renderer.answer(out[0, ids.shape[1]:].tolist()))
    assert len(set(alone)) > 3, "a model that always says the same would prove little"
    for size in (1, 5, 16):
        assert generate_answers(model, renderer, conversations, 6, size, PAD) == alone, size


def test_exact_match_counts_the_answers_that_are_equal(tmp_path):
    model, conversations = llama(F64), rows(tmp_path)
    said = score(model, conversations, metric="exact").answers
    told = [replace(c, messages=(*c.messages[:-1], Message("assistant", f" {a.strip() or 'x'} " if i % 3 else "other")))
            for i, (c, a) in enumerate(zip(conversations, said, strict=True))]
    hits = sum(a.strip() == c.reference.strip() for a, c in zip(said, told, strict=True))
    found = score(model, told, metric="exact", batch_size=3)
    assert 0 < hits < 13 and found.value == hits / 13 and found.interval == wilson(hits, 13) and found.answers == said


def test_choice_picks_the_answer_of_least_loss(tmp_path):
    data = [row | {"completion": "1234"[i % 4]} for i, row in enumerate(lines(13))]     # answers of one token
    conversations, renderer, seen = load_conversations([write(tmp_path / "rows.jsonl", data)]), Renderer(TOKENIZER), set()
    options = sorted({c.reference for c in conversations})
    for seed in range(3):                              # a model alone says much the same to every prompt
        model = llama(F64)
        fill(attach(model).add("a", ADAPTERS["lora"]), seed=seed, scale=0.5)
        picked = []
        for c in conversations:
            asked = [replace(c, messages=(*c.messages[:-1], Message("assistant", o))) for o in options]
            losses = [plain_loss(model, e)[0] for e in renderer.examples(asked, 128)[0]]
            picked.append(options[losses.index(min(losses))].strip())
        found = score(model, conversations, metric="choice")
        assert list(found.answers) == picked
        assert found.value == sum(p == c.reference.strip() for p, c in zip(picked, conversations, strict=True)) / 13
        named = score(model, conversations, metric="choice", choices=[o.strip() for o in options])
        assert named.answers == found.answers
        seen |= set(picked)
    assert len(seen) > 1


def test_choice_over_turns_that_a_template_rewrites(tmp_path):
    tokenizer, _ = styled("rewrites")
    chat = [Conversation("chat", (Message("user", f"q{i}"), Message("assistant", "yes"), Message("user", "and now?"),
                                  Message("assistant", "yes" if i % 2 else "no")), f"f:{i}") for i in range(6)]
    model = llama(vocab_size=len(tokenizer))
    found = score(model, chat, tokenizer, metric="choice")
    assert found.n == 6 and set(found.answers) <= {"yes", "no"}


@pytest.mark.parametrize("style", STYLES)
def test_chats_of_every_template_are_scored(style):
    tokenizer, _ = styled(style)
    chat = [Conversation("chat", (Message("user", f"word {i}"), Message("assistant", "yes" if i % 2 else "no")), f"f:{i}")
            for i in range(6)]
    model = llama(vocab_size=len(tokenizer))
    for metric in ("loss", "exact", "choice"):
        assert score(model, chat, tokenizer, metric=metric).n == 6


def test_what_cannot_be_compared_is_refused(tmp_path):
    model, conversations = llama(), rows(tmp_path)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the answer 'one' is not among the choices: red, won; did you mean 'won'"):
        score(model, conversations, metric="choice", choices=["red", "won"])
    with pytest.raises(UserError, match="at least two different answers, there is 1"):
        score(model, conversations[:1], metric="choice")
    with pytest.raises(UserError, match="longer than 18 tokens"):
        score(model, conversations, metric="choice", max_length=18)
    with pytest.raises(UserError, match="no held-out rows"):
        score(model, [])


def test_a_loss_that_is_not_finite_is_an_error_and_not_a_score(tmp_path):
    model, conversations = llama(), rows(tmp_path)
    bad = TOKENIZER(conversations[6].messages[0].content)["input_ids"][1]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("inf")
    with pytest.raises(RunError, match=r"not finite in \d+ held-out rows, first .*rows\.jsonl:\d+"):
        score(model, conversations, metric="loss")


def test_rows_over_the_limit_are_counted(tmp_path):
    model, conversations = llama(), rows(tmp_path)
    assert "cut" not in score(model, conversations, metric="loss").plain()
    found = score(model, conversations, metric="loss", max_length=18)
    longer = sum(len(e.ids) > 18 for e in Renderer(TOKENIZER).examples(conversations, 999)[0])
    assert found.cut == found.plain()["cut"] == longer > 0


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_answers_near_the_end_of_the_models_positions_are_the_same_in_any_batch(kind, name, tmp_path):
    size = {"n_positions": 32} if kind == "gpt2" else {"max_position_embeddings": 32}
    model, conversations = llama(F64, kind=kind, **size), rows(tmp_path, 22)
    fill(attach(model).add("a", ADAPTERS[name]), seed=1)
    renderer = Renderer(TOKENIZER)
    longest = max(len(renderer.prompt(c)) for c in conversations)
    assert longest < room(model) < longest + 12
    want = generate_answers(model, renderer, conversations, 12, 1, PAD)
    assert generate_answers(model, renderer, conversations, 12, 8, PAD) == want
    long = replace(conversations[0], messages=(Message("user", "so " * 40), Message("assistant", "x")))
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: the prompt has \d+ tokens, the model takes {room(model)}"):
        generate_answers(model, renderer, [long], 4, 4, PAD)


def test_a_prompt_without_a_token_is_refused():
    tokenizer, _ = styled("chatml")                    # adds no beginning of text
    nothing = Conversation("plain", (Message("user", ""), Message("assistant", "x y z")), "f:7")
    with pytest.raises(UserError, match="f:7: the prompt is empty"):
        generate_answers(llama(vocab_size=len(tokenizer)), Renderer(tokenizer), [nothing], 4, 4, PAD)


def test_the_interval_is_wilsons():
    """Values of Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, n), (low, high) in known.items():
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)


def test_bleu_is_sacrebleus_with_the_rows_of_one_prompt_as_references():
    sacrebleu = pytest.importorskip("sacrebleu")
    data = [("a b", "the cat sat on the mat today"), ("a b", "a cat was sitting on the mat today"),
            ("c", "dogs bark loudly at night here"), ("a b", "there is a cat on the mat now")]
    said = {"a b": "the cat was on the mat today", "c": "dogs bark at night very loudly"}
    rows = [Conversation("plain", (Message("user", p), Message("assistant", r)), "f:1") for p, r in data]
    want = sacrebleu.corpus_bleu([said["a b"], said["c"]], [[data[0][1], data[2][1]], [data[1][1], None], [data[3][1], None]]).score
    assert bleu(rows, [said[p] for p, _ in data]) == pytest.approx(want, abs=1e-9) and 10 < want < 90


def test_the_metric_is_picked_by_the_answers():
    def told(answers, kind="plain"):
        return [Conversation(kind, (Message("user", "q"), Message("assistant", a)), "f:1") for a in answers]
    assert pick_metric(told(["yes", "no"] * 3), ()) == "choice"
    assert pick_metric(told(["a", "b", "c"]), ()) == "exact" and pick_metric(told(["a", "b"]), ["a", "b"]) == "choice"
    assert pick_metric(told(["long " * 40] * 3), ()) == "loss"
    assert pick_metric([Conversation("text", (Message("assistant", "t"),), "f:1")], ()) == "loss"


def test_evaluation_restores_the_mode_and_keeps_no_gradient(tmp_path):
    model, conversations = llama(), rows(tmp_path)
    model.train()
    score(model, conversations, metric="exact")
    assert model.training and all(p.grad is None for p in model.parameters())

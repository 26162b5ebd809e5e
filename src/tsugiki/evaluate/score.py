"""Scores of a model on conversations, each with n, a 95 % interval, and what every row gave; one way for files and tasks."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from tsugiki.config import EvalConfig
from tsugiki.data.batch import collate, micro_batches
from tsugiki.data.conversation import Conversation, Message
from tsugiki.data.render import Example, Renderer
from tsugiki.errors import RunError, UserError, nearest
from tsugiki.evaluate.answers import generate_answers, room
from tsugiki.evaluate.intervals import bootstrap, wilson
from tsugiki.evaluate.metrics import LOWER, TEXTS, Scoring, Stats, cut, name, right, text_stats, value
from tsugiki.train.loss import token_losses

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One row to score: a conversation that ends with the text whose loss is told, the expected answer, and, for metric choice,
    (choice, the answer that says it) of every choice. `question`: what is asked, without a task's wording around it."""
    conversation: Conversation
    gold: str
    options: tuple[tuple[str, str], ...] = ()
    question: str = ""


@dataclass(frozen=True)
class Row:
    """What one row gave: its "file:line", prompt, expected answer, the model's, and the metric's numbers (`metrics.value`)."""
    where: str
    prompt: str
    expected: str
    answer: str
    stats: Stats


@dataclass(frozen=True)
class Score:
    """`value` of `metric` over n rows; `loss` in nats per supervised token; `interval` at 95 %, where one is defined; `cut`
    rows whose loss is of their first tokens only, or missing, since they are longer than the limit; `unanswered` rows that
    are too long for the model and count as wrong; `also`: other scores of the same answers, and, of a choice, `majority`: what
    saying the most frequent answer to everything would give."""
    metric: str
    value: float
    n: int
    loss: float
    interval: tuple[float, float] | None = None
    cut: int = 0
    unanswered: int = 0
    also: dict[str, float] = field(default_factory=dict)
    results: tuple[Row, ...] = field(default=(), repr=False)

    @property
    def rows(self) -> tuple[float, ...]:
        """The score of each row alone: 1.0 or 0.0 for right or wrong, a loss, a BLEU."""
        return tuple(map(value(self.metric), (r.stats for r in self.results)))

    @property
    def answers(self) -> tuple[str, ...]:
        """What was generated, or picked; nothing where only the loss was asked for."""
        return () if self.metric in LOWER else tuple(r.answer for r in self.results)

    def plain(self) -> dict:
        """What `eval --json` prints: the metric under its own name and as `value`, n, interval, loss, perplexity."""
        found = {"metric": self.metric, self.metric: self.value, "value": self.value, "n": self.n, "loss": self.loss,
                 "perplexity": math.exp(min(self.loss, 700.0))} | self.also
        found |= {"interval": list(self.interval)} if self.interval else {}
        return found | {key: count for key in ("cut", "unanswered") if (count := getattr(self, key))}

    def better_than(self, other: float) -> bool:
        return self.value < other if self.metric in LOWER else self.value > other


@torch.no_grad()
def row_losses(model: nn.Module, examples: Sequence[Example], pad_id: int, max_tokens: int = 4096,
               progress: Callable[[int, int], None] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (nats) and number of targets of every example: two float64 tensors (N,), in order."""
    sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.float64)
    lengths, device = [len(e.ids) for e in examples], model.get_input_embeddings().weight.device
    done = 0
    for forward in micro_batches(lengths, range(len(examples)), "pad", max_tokens):
        losses, rows = token_losses(model, collate(examples, forward, pad_id).to(device))
        sums.index_add_(0, rows.cpu(), losses.double().cpu())
        counts.index_add_(0, rows.cpu(), torch.ones(len(rows), dtype=torch.float64))
        done += len(forward)
        if progress:
            progress(done, len(examples))
    return sums, counts


def pick_metric(conversations: Sequence[Conversation], choices: Sequence[str]) -> str:
    """choice for few distinct answers, exact for short ones, else loss alone."""
    if any(c.kind == "text" for c in conversations):
        return "loss"
    answers = Counter(c.reference.strip() for c in conversations)
    if choices or 1 < len(answers) <= 20 and len(conversations) >= 3 * len(answers):
        return "choice"
    lengths = sorted(len(c.reference.split()) for c in conversations)
    return "exact" if lengths[len(lengths) // 2] <= 24 else "loss"


def scoring_of(cfg: EvalConfig, metric: str) -> Scoring:
    """How a user's own rows are scored."""
    by = "likelihood" if cfg.choice_by == "auto" else cfg.choice_by
    tolerance = 1e-3 if cfg.tolerance is None else cfg.tolerance
    return Scoring(metric=metric, choice_by=by, pattern=cfg.pattern, tolerance=tolerance, max_new_tokens=cfg.new_tokens,
                   until=tuple(cfg.until))


def evaluate(model: nn.Module, renderer: Renderer, conversations: Sequence[Conversation], cfg: EvalConfig, pad_id: int,
             max_length: int, progress: Progress | None = None) -> Score:
    """Score `model` as it is routed now on a user's own rows. Draws no random number, keeps no gradient, leaves no mode changed.

    Raises UserError for rows that cannot be scored as asked, RunError when a loss is not finite.
    """
    conversations = conversations[:cfg.max_rows]
    if not conversations:
        raise UserError("nothing to evaluate: no held-out rows (data.eval or data.holdout)")
    metric = pick_metric(conversations, cfg.choices) if cfg.metric == "auto" else cfg.metric
    options = _options(conversations, cfg.choices) if metric == "choice" else ()
    items = [Item(c, c.reference, options) for c in conversations]
    return measure(model, renderer, items, scoring_of(cfg, metric), cfg.batch_size, pad_id, max_length, progress)


def _options(conversations: Sequence[Conversation], choices: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The allowed answers, as the rows write them."""
    given = {c.strip(): c for c in choices}
    seen = {c.reference.strip(): c.reference for c in conversations}
    options = tuple((key, seen.get(key, given.get(key))) for key in sorted(given or seen))
    if len(options) < 2:
        raise UserError(f"metric choice needs at least two different answers, there is {len(options)}; name them with eval.choices")
    for c in conversations:
        if given and c.reference.strip() not in given:
            raise UserError(f"{c.where}: the answer {c.reference.strip()[:60]!r} is not among the choices: {', '.join(given)[:120]}"
                            f"{nearest(c.reference.strip(), given)}")
    return options


def measure(model: nn.Module, renderer: Renderer, items: Sequence[Item], how: Scoring, batch_size: int, pad_id: int,
            max_length: int, progress: Progress | None = None, lenient: bool = False) -> Score:
    """Score `model` as it is routed now. `lenient`: a row that is too long for the model is wrong, and no error.

    Answers and losses do not depend on how rows are batched. Raises UserError for rows that cannot be scored as asked, RunError
    when a loss is not finite.
    """
    was_training = model.training
    model.eval()
    try:
        examples, report = renderer.examples([i.conversation for i in items], max_length)
        sums, counts = row_losses(model, examples, pad_id, progress=progress)
        loss = float(sums.sum() / counts.sum())
        if not math.isfinite(loss):
            bad = [e.where for e, s in zip(examples, sums.tolist(), strict=True) if not math.isfinite(s)]
            raise RunError(f"the loss is not finite in {len(bad)} held-out rows, first {bad[0] if bad else examples[0].where}")
        also: dict[str, float] = {}
        if how.metric in LOWER:
            rows = [Row(e.where, "", "", "", pair) for e, pair in zip(examples, zip(sums.tolist(), counts.tolist(), strict=True),
                                                                      strict=True)]
            answers = []
        elif how.generates:
            answers = _generated(model, renderer, items, how, batch_size, pad_id, progress, lenient)
            rows, also = _held_against(items, answers, how)
        else:
            answers = _likeliest(model, renderer, items, how.choice_by == "likelihood-norm", pad_id, max_length, progress, lenient)
            rows = [_row(i, a, (float(a == i.gold.strip()), 1.0)) for i, a in zip(items, answers, strict=True)]
        if how.metric == "choice":
            also = {"majority": Counter(r.expected for r in rows).most_common(1)[0][1] / len(rows)}
        return _scored(how.metric, rows, loss, report.cut, answers.count(None), also)
    finally:
        model.train(was_training)


def _generated(model, renderer, items: Sequence[Item], how: Scoring, batch_size, pad_id, progress, lenient) -> list[str | None]:
    """Each row's greedy answer; None for a prompt that leaves the model no room."""
    limit, short = room(model), list(range(len(items)))
    if lenient and limit:
        short = [n for n, ids in enumerate(renderer.prompts([i.conversation for i in items])) if len(ids) < limit]
    answers = generate_answers(model, renderer, [items[n].conversation for n in short], how.max_new_tokens, batch_size, pad_id,
                               progress) if short else []
    given = dict(zip(short, answers, strict=True))
    return [cut(given[n], how.until) if n in given else None for n in range(len(items))]


def _likeliest(model, renderer, items: Sequence[Item], by_length: bool, pad_id, max_length, progress, lenient) -> list[str | None]:
    """The most likely of each row's choices, each scored whole with its stop token; `by_length`: the mean of its tokens. None for
    a row too long to compare them."""
    variants = [replace(i.conversation, messages=(*i.conversation.messages[:-1], Message("assistant", text)))
                for i in items for _, text in i.options]
    last = copy(renderer)                                   # earlier turns are the same for every choice
    last.train_on = "last"
    examples, _ = last.examples(variants, 1 << 30)
    each, start = [], 0
    for i in items:
        each.append(range(start, start := start + len(i.options)))
    fits = [all(len(examples[n].ids) <= max_length for n in numbers) for numbers in each] if len(examples) == start else []
    if not fits or not (all(fits) or lenient):
        raise UserError(f"a prompt is longer than {max_length} tokens, so its choices cannot be compared; raise the max length")
    kept = [n for numbers, fit in zip(each, fits, strict=True) if fit for n in numbers]
    sums, counts = row_losses(model, [examples[n] for n in kept], pad_id, progress=progress)
    losses = dict(zip(kept, (sums / counts if by_length else sums).tolist(), strict=True))
    return [i.options[min(numbers, key=losses.__getitem__) - numbers[0]][0].strip() if fit else None
            for i, numbers, fit in zip(items, each, fits, strict=True)]


def _row(item: Item, answer: str | None, stats: Stats) -> Row:
    return Row(item.conversation.where, item.conversation.prompt_text, item.gold.strip(), answer or "", stats)


def _held_against(items: Sequence[Item], answers: Sequence[str | None], how: Scoring) -> tuple[list[Row], dict[str, float]]:
    """The rows' numbers; of bleu and rouge_l one row a prompt, with all its references."""
    if how.metric not in TEXTS:
        return [_row(i, a, (float(a is not None and right(how, a, i.gold, [c for c, _ in i.options], i.conversation.where)), 1.0))
                for i, a in zip(items, answers, strict=True)], {}
    asked: dict[str, list[int]] = {}
    for n, i in enumerate(items):
        asked.setdefault(i.conversation.prompt_text, []).append(n)
    rows, also = [], {}
    for metric in (how.metric, *how.also):
        stats = [text_stats(metric, (answers[ns[0]] or "").strip(), [items[n].gold.strip() for n in ns]) for ns in asked.values()]
        also[metric] = value(metric)([sum(column) for column in zip(*stats, strict=True)])
        rows = rows or [_row(items[ns[0]], answers[ns[0]], s) for ns, s in zip(asked.values(), stats, strict=True)]
    return rows, {m: v for m, v in also.items() if m != how.metric}


def _scored(metric: str, rows: Sequence[Row], loss: float, cut: int, unanswered: int, also: dict[str, float]) -> Score:
    """The rows summed up, with the interval that fits: Wilson's for a share, else a bootstrap."""
    called, stats = name(metric), [r.stats for r in rows]
    of, sums = value(called), [sum(column) for column in zip(*stats, strict=True)]
    got = loss if metric == "loss" else of(sums)
    interval = wilson(round(sums[0]), len(rows)) if called == "accuracy" else bootstrap(stats, of)
    return Score(called, got, len(rows), loss, interval, cut, unanswered, also, tuple(rows))


def bleu(conversations: Sequence[Conversation], answers: Sequence[str]) -> float:
    """Corpus BLEU by sacrebleu; rows with one prompt are references of one answer."""
    rows, _ = _held_against([Item(c, c.reference) for c in conversations], answers, Scoring(metric="bleu"))
    return value("bleu")([sum(column) for column in zip(*(r.stats for r in rows), strict=True)])

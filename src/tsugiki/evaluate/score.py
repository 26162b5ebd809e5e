"""Scores of a model on conversations: loss, perplexity, exact match, choice by likelihood, BLEU, with 95 % intervals."""
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
from tsugiki.evaluate.answers import generate_answers
from tsugiki.train.loss import token_losses


@dataclass(frozen=True)
class Score:
    """`value` of `metric` over n rows; `loss` in nats per supervised token; `interval` at 95 %, where one is defined; `cut`
    rows whose loss is of their first tokens only, or missing, since they are longer than the limit."""
    metric: str
    value: float
    n: int
    loss: float
    interval: tuple[float, float] | None = None
    answers: tuple[str, ...] = field(default=(), repr=False)
    cut: int = 0

    def plain(self) -> dict:
        """What `eval --json` prints: the metric under its own name, n, interval, loss, perplexity."""
        found = {"metric": self.metric, self.metric: self.value, "n": self.n, "loss": self.loss,
                 "perplexity": math.exp(min(self.loss, 700.0))}
        found |= {"interval": list(self.interval)} if self.interval else {}
        return found | ({"cut": self.cut} if self.cut else {})

    def better_than(self, other: float) -> bool:
        return self.value < other if self.metric == "loss" else self.value > other


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, p = 1.959963984540054, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n)))


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


def evaluate(model: nn.Module, renderer: Renderer, conversations: Sequence[Conversation], cfg: EvalConfig, pad_id: int,
             max_length: int, progress: Callable[[int, int], None] | None = None) -> Score:
    """Score `model` as it is routed now. Draws no random number, keeps no gradient, leaves no mode changed.

    Raises UserError for rows that cannot be scored as asked, RunError when a loss is not finite.
    """
    conversations = conversations[:cfg.max_rows]
    if not conversations:
        raise UserError("nothing to evaluate: no held-out rows (data.eval or data.holdout)")
    was_training = model.training
    model.eval()
    try:
        examples, report = renderer.examples(conversations, max_length)
        sums, counts = row_losses(model, examples, pad_id, progress=progress)
        loss, cut = float(sums.sum() / counts.sum()), report.cut
        if not math.isfinite(loss):
            bad = [e.where for e, s in zip(examples, sums.tolist(), strict=True) if not math.isfinite(s)]
            raise RunError(f"the loss is not finite in {len(bad)} held-out rows, first {bad[0] if bad else examples[0].where}")
        metric = pick_metric(conversations, cfg.choices) if cfg.metric == "auto" else cfg.metric
        if metric == "loss":
            return Score("loss", loss, len(examples), loss, cut=cut)
        if metric == "choice":
            hits, answers = _choice(model, renderer, conversations, cfg.choices, pad_id, max_length, progress)
        else:
            answers = generate_answers(model, renderer, conversations, cfg.max_new_tokens, cfg.batch_size, pad_id, progress)
            if metric == "bleu":
                return Score("bleu", bleu(conversations, answers), len(conversations), loss, None, tuple(answers), cut)
            hits = sum(a.strip() == c.reference.strip() for a, c in zip(answers, conversations, strict=True))
        n = len(conversations)
        return Score("accuracy", hits / n, n, loss, wilson(hits, n), tuple(answers), cut)
    finally:
        model.train(was_training)


def _choice(model, renderer, conversations, choices, pad_id, max_length, progress) -> tuple[int, list[str]]:
    """The most likely of the allowed answers, each scored whole with its stop token."""
    given = {c.strip(): c for c in choices}
    seen = {c.reference.strip(): c.reference for c in conversations}
    options = [seen.get(key, given.get(key)) for key in sorted(given or seen)]
    if len(options) < 2:
        raise UserError(f"metric choice needs at least two different answers, there is {len(options)}; name them with eval.choices")
    for c in conversations:
        if given and c.reference.strip() not in given:
            raise UserError(f"{c.where}: the answer {c.reference.strip()[:60]!r} is not among the choices: {', '.join(given)[:120]}"
                            f"{nearest(c.reference.strip(), given)}")
    variants = [replace(c, messages=(*c.messages[:-1], Message("assistant", option))) for c in conversations for option in options]
    last = copy(renderer)                                   # earlier turns are the same for every choice
    last.train_on = "last"
    examples, report = last.examples(variants, max_length)
    if report.cut or len(examples) != len(variants):
        raise UserError(f"a prompt is longer than {max_length} tokens, so its choices cannot be compared; raise the max length")
    sums, _ = row_losses(model, examples, pad_id, progress=progress)
    best = sums.view(len(conversations), len(options)).argmin(1).tolist()
    answers = [options[b].strip() for b in best]
    return sum(a == c.reference.strip() for a, c in zip(answers, conversations, strict=True)), answers


def bleu(conversations: Sequence[Conversation], answers: Sequence[str]) -> float:
    """Corpus BLEU by sacrebleu; rows with one prompt are references of one answer."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError("eval.metric bleu needs sacrebleu: pip install 'tsugiki[eval]'") from None
    references: dict[str, list[str]] = {}
    hypothesis: dict[str, str] = {}
    for c, answer in zip(conversations, answers, strict=True):
        references.setdefault(c.prompt_text, []).append(c.reference.strip())
        hypothesis.setdefault(c.prompt_text, answer.strip())
    width = max(map(len, references.values()))
    streams = [[refs[k] if k < len(refs) else None for refs in references.values()] for k in range(width)]
    return BLEU().corpus_score(list(hypothesis.values()), streams).score

"""What an answer is worth: each metric is a few numbers a row, and a value of their sum."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import regex

from tsugiki.errors import UserError
from tsugiki.evaluate.extract import choice, number

Stats = tuple[float, ...]
LOWER = ("loss", "perplexity")                        # less is better
TEXTS = ("bleu", "rouge_l")                           # rows of one prompt are references of one answer
GENERATED = ("exact", "number", "contains", "regex", *TEXTS)
SECONDS = 1.0                                         # that a user's pattern may take on one answer


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How answers are held against what is expected. `metric`: exact, number, choice, contains, regex, bleu, rouge_l, loss or
    perplexity; `also`: more of bleu and rouge_l on the same answers."""
    metric: str
    choice_by: str = "likelihood"
    pattern: str | None = None
    tolerance: float = 1e-3
    max_new_tokens: int = 64
    until: tuple[str, ...] = ()
    also: tuple[str, ...] = field(default=())

    @property
    def generates(self) -> bool:
        return self.metric in GENERATED or self.metric == "choice" and self.choice_by == "generation"


def name(metric: str) -> str:
    """What a score is called: everything that counts right answers is an accuracy."""
    return metric if metric in (*LOWER, *TEXTS) else "accuracy"


def value(metric: str) -> Callable[[Sequence[float]], float]:
    """From the sum of the rows' numbers to the score of that name."""
    if metric == "bleu":
        return _bleu_of
    if metric == "perplexity":
        return lambda sums: math.exp(min(sums[0] / sums[1], 700.0))
    if metric == "rouge_l":
        return lambda sums: 100 * sums[0] / sums[1]
    return lambda sums: sums[0] / sums[1]


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first of the texts that end one: what comes after is another question that the model made up."""
    ends = [at for text in until if (at := answer.find(text)) >= 0]
    return answer[:min(ends)] if ends else answer


def found(how: Scoring, answer: str, options: Sequence[str]) -> str | float | None:
    """What of an answer is compared."""
    if how.metric == "number":
        return number(answer)
    if how.metric == "choice":
        return choice(answer, options)
    if how.metric == "regex" and how.pattern:
        return _last(how.pattern, answer)
    return answer.strip()


def right(how: Scoring, answer: str, gold: str, options: Sequence[str] = (), where: str = "") -> bool:
    """Whether an answer is the expected one. Raises UserError for an expected answer that is not of the metric's kind."""
    got = found(how, answer, options)
    if how.metric == "number":
        want = number(gold)
        if want is None:
            raise UserError(f"{where}: metric number: the expected answer {gold.strip()[:60]!r} holds no number")
        return got is not None and abs(got - want) <= how.tolerance
    if how.metric == "contains":
        return _plain(gold) in _plain(answer)
    if how.metric == "regex" and not how.pattern:
        return _search(gold, answer, where) is not None
    if how.metric == "regex":
        return got is not None and got == (_last(how.pattern, gold) or gold.strip())
    return got is not None and got == gold.strip()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _compiled(pattern: str, where: str) -> regex.Pattern:
    try:
        return regex.compile(pattern)
    except regex.error as e:
        raise UserError(f"{where}: not a regular expression: {str(e)[:100]}") from None


def _search(pattern: str, text: str, where: str):
    try:
        return _compiled(pattern, where).search(text, timeout=SECONDS)
    except TimeoutError:
        raise UserError(f"{where}: the pattern {pattern[:60]!r} takes more than {SECONDS:g} s on one answer") from None


def _last(pattern: str, text: str) -> str | None:
    """The last match of a pattern: its first group, where it has one."""
    compiled = _compiled(pattern, "eval.pattern")
    try:
        matches = list(compiled.finditer(text, timeout=SECONDS))
    except TimeoutError:
        raise UserError(f"eval.pattern: {pattern[:60]!r} takes more than {SECONDS:g} s on one answer") from None
    return (matches[-1][1 if compiled.groups else 0] or "").strip() if matches else None


def text_stats(metric: str, answer: str, references: Sequence[str]) -> Stats:
    """A row's numbers of BLEU (4 matches, 4 totals, two lengths; sacrebleu) or of ROUGE-L (the best reference's F)."""
    if metric == "bleu":
        score = _bleu()().corpus_score([answer], [[r] for r in references])
        return *map(float, score.counts), *map(float, score.totals), float(score.sys_len), float(score.ref_len)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("eval.metric rouge_l needs rouge-score: pip install 'tsugiki[eval]'") from None
    scorer = RougeScorer(["rougeL"])
    return max(scorer.score(r, answer)["rougeL"].fmeasure for r in references), 1.0


def _bleu():
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError("eval.metric bleu needs sacrebleu: pip install 'tsugiki[eval]'") from None
    return BLEU


def _bleu_of(sums: Sequence[float]) -> float:
    """Corpus BLEU of summed statistics."""
    whole = [round(x) for x in sums]
    return _bleu().compute_bleu(whole[:4], whole[4:8], whole[8], whole[9], smooth_method="exp").score

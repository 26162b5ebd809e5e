"""How sure a score is: each number equals a plain computation, and draws are a stream of their own."""
import math
from itertools import product

import pytest
import torch

from tsugiki.evaluate.intervals import bootstrap, mcnemar, paired, resampled
from tsugiki.evaluate.metrics import text_stats, value


def test_mcnemar_is_the_exact_two_sided_sign_test():
    """By counting all outcomes of n fair coins that are at most as likely as the one seen."""
    for n in range(1, 11):
        outcomes = [sum(coins) for coins in product((0, 1), repeat=n)]
        for a in range(n + 1):
            few = min(a, n - a)
            want = min(1.0, 2 * sum(k <= few for k in outcomes) / len(outcomes))
            assert mcnemar(a, n - a) == pytest.approx(want, abs=1e-12)
    assert mcnemar(0, 0) == 1.0 and mcnemar(2_000, 1_800) == mcnemar(1_800, 2_000) == pytest.approx(0.00124, abs=2e-4)


def test_a_resampling_draws_every_row_as_often_as_rows_there_are():
    stats = torch.arange(7, dtype=torch.float64)[:, None].repeat(1, 2)
    stats[:, 1] = 1
    sums = resampled(stats)
    assert sums.shape == (1000, 2) and bool((sums[:, 1] == 7).all())
    assert 0 <= float(sums[:, 0].min()) < float(sums[:, 0].max()) <= 42
    assert float(sums[:, 0].mean()) == pytest.approx(21, abs=0.7)


def test_draws_are_keyed_and_move_no_others():
    stats = [(float(i % 3 == 0), 1.0) for i in range(50)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = bootstrap(stats, value("accuracy"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert bootstrap(stats, value("accuracy")) == first != bootstrap(stats, value("accuracy"), seed=1)
    assert bootstrap(stats[:1], value("accuracy")) is None


def test_a_bootstrap_covers_what_theory_says():
    draw = torch.Generator().manual_seed(0)
    stats = [(float(x), 1.0) for x in torch.randn(400, generator=draw, dtype=torch.float64)]
    mean = sum(s[0] for s in stats) / 400
    low, high = bootstrap(stats, value("loss"))
    half = 1.96 * math.sqrt(sum((s[0] - mean) ** 2 for s in stats) / 400 / 400)
    assert low == pytest.approx(mean - half, abs=0.015) and high == pytest.approx(mean + half, abs=0.015)


def test_right_and_wrong_are_compared_by_mcnemar_and_the_rest_by_a_paired_bootstrap():
    a, b = [(1.0, 1.0)] * 12 + [(0.0, 1.0)] * 8, [(0.0, 1.0)] * 9 + [(1.0, 1.0)] * 4 + [(0.0, 1.0)] * 7
    found = paired("accuracy", a, b, value("accuracy"))
    assert (found.better, found.worse, found.n) == (9, 1, 20) and found.p == mcnemar(9, 1) and found.test == "exact McNemar"
    assert found.difference == pytest.approx(0.4) and found.interval[0] < 0.4 < found.interval[1]
    losses = [(float(i), 2.0) for i in range(1, 31)]
    worse = [(x + 0.5, n) for x, n in losses]
    found = paired("loss", losses, worse, value("loss"), lower=True)
    assert found.better == 30 and found.worse == 0 and found.difference == pytest.approx(-0.25) and found.p < 0.01
    assert found.interval == pytest.approx((-0.25, -0.25)) and "bootstrap" in found.test
    same = paired("loss", losses, losses, value("loss"), lower=True)
    assert same.difference == 0 and same.p == 1 and paired("accuracy", a, a, value("accuracy")).p == 1
    with pytest.raises(ValueError, match="no pairs"):
        paired("loss", losses, losses[:3], value("loss"))


def test_bleu_and_rouge_of_the_rows_sum_up_to_the_libraries_own():
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    said = ["the cat sat on the mat today", "dogs bark at night very loudly", ""]
    refs = [["a cat was on the mat today", "the cat sat on a mat now"], ["dogs bark loudly at night here"], ["nothing said"]]
    stats = [text_stats("bleu", s, r) for s, r in zip(said, refs, strict=True)]
    streams = [[r[0] for r in refs], [r[1] if len(r) > 1 else None for r in refs]]
    want = sacrebleu.corpus_bleu(said, streams).score
    assert value("bleu")([sum(c) for c in zip(*stats, strict=True)]) == pytest.approx(want, abs=1e-9) and 5 < want < 95
    rouge = [text_stats("rouge_l", s, r) for s, r in zip(said, refs, strict=True)]
    want = sum(max(scorer.score(r, s)["rougeL"].fmeasure for r in rs) for s, rs in zip(said, refs, strict=True)) / 3
    assert value("rouge_l")([sum(c) for c in zip(*rouge, strict=True)]) == pytest.approx(100 * want) and want > 0.3

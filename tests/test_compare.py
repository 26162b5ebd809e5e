"""A study finds what it should, looks at test rows last, outlives a run that fails, and ends the same however it is stopped."""
from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import TOKENIZER, lines, llama, write

from tsugiki.cli.compare import method_of
from tsugiki.cli.main import main
from tsugiki.compare import Study, study_of
from tsugiki.compare.planning import planned
from tsugiki.compare.runner import prepare
from tsugiki.compare.schedule import Lengths, choice, expected, pending
from tsugiki.compare.sizes import count, nearest, size_field
from tsugiki.compare.stats import Pool, compared, difference, holm, mean_of, pool, quantile, ranks
from tsugiki.compare.study import Variant
from tsugiki.compare.table import tabled
from tsugiki.errors import UserError
from tsugiki.formats.export import export_model
from tsugiki.methods import METHODS

LENGTHS = Lengths(256, {"data": 100})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama and its tokenizer as a transformers folder."""
    return str(export_model(llama(), TOKENIZER, tmp_path_factory.mktemp("base") / "base", dtype=torch.float32))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", lines(40))
    Path(f"{path}.txt").write_text("one and two and three are six. " * 20)
    return str(path)


def study(**more) -> Study:
    return study_of({"out": "x", "methods": ["lora"], "data": {"files": ["rows.jsonl"]}} | more)


# The schedule

def played(made: Study, loss, fails=lambda cell: False, lengths=LENGTHS) -> tuple[dict, list]:
    """Results as if every run had the validation loss `loss(cell)`; the cells in the order they were run."""
    results, order = {}, []
    while cells := pending(made, results, lengths):
        cell = cells[0]
        order.append(cell)
        if fails(cell):
            results[cell.key] = {"failed": "step 3: the loss is not finite"}
            continue
        value = loss(cell) if cell.steps else 9.0
        results[cell.key] = {"trainable": 5, "total": 10, "tokens": 7, "seconds": 1.0, "memory": 1, "curve": [],
                             "validation": {"metric": "loss", "loss": value}}
        if cell.test:
            results[cell.key]["test"] = {"metric": "accuracy", "accuracy": 0.5, "loss": 99.0 - value, "n": 2, "rows": [0.0, 1.0],
                                         "answers": []}
    return results, order


def near(best: float):
    return lambda cell: 1.0 + abs(math.log(cell.lr / best)) + 1.0 / cell.steps


def test_a_rate_is_chosen_on_validation_rows_and_only_then_test_rows_are_scored():
    made = study(seeds=[3, 4, 5])
    recommended = METHODS["lora"].rate(256)
    results, order = played(made, near(recommended))
    searched, final = [c for c in order if c.steps and not c.test], [c for c in order if c.steps and c.test]
    assert {c.seed for c in searched} == {3} and len(searched) == 3 and [c.seed for c in final] == [3, 4, 5]
    assert {c.lr for c in final} == {recommended} and order.index(final[0]) > max(order.index(c) for c in searched)
    assert choice(made, "data", made.variants()[0], results, LENGTHS).edge == ""
    for result in results.values():                   # what the test rows say does not matter
        if "test" in result:
            result["test"]["loss"] = -1e9 * result["validation"]["loss"]
    assert choice(made, "data", made.variants()[0], results, LENGTHS).lr == recommended


@pytest.mark.parametrize("off,tried,edge", [
    (3.0, 4, ""), (0.3, 4, ""), (9.0, 5, ""), (300.0, 5, "highest"), (1 / 300, 5, "lowest"), (1.0, 3, "")])
def test_the_grid_grows_while_the_best_is_at_its_edge_and_says_when_it_still_is(off, tried, edge):
    made = study()
    results, _ = played(made, near(METHODS["lora"].rate(256) * off))
    found = choice(made, "data", made.variants()[0], results, LENGTHS)
    assert len(found.tried) == tried and found.edge == edge
    assert found.lr == min((c.lr for c in found.tried), key=lambda lr: abs(math.log(lr / (METHODS["lora"].rate(256) * off))))


def test_halving_takes_short_runs_first_and_spends_less():
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    whole, short = study(rates=rates), study(rates=rates, search="halving")
    (_, grid), (results, halved) = played(whole, near(1e-2)), played(short, near(1e-2))
    lengths = [c.steps for c in halved if c.steps]
    assert lengths == [13] * 8 + [25] * 4 + [50] * 2 + [100] * 3
    assert sum(lengths) < 0.7 * sum(c.steps for c in grid)
    assert choice(short, "data", short.variants()[0], results, LENGTHS).lr == 1e-2
    assert {c.lr for c in halved if c.steps == 100} == {1e-2}


def test_a_failing_rate_is_passed_over_and_a_method_that_always_fails_ends():
    made = study(rates=[1e-3, 1e-2, 1e-1])
    results, _ = played(made, near(1e-1), fails=lambda c: c.lr == 1e-1)
    assert choice(made, "data", made.variants()[0], results, LENGTHS).lr == 1e-2
    auto = study()
    results, order = played(auto, near(1.0), fails=lambda c: c.steps > 0)
    table = tabled(auto, results, LENGTHS)
    assert not pending(auto, results, LENGTHS) and len(order) == 6             # the base, three rates, two lower ones
    [row] = table.data[0].rows
    assert row.score is None and "every rate failed" in row.failed[0] and len(table.failures) == 5


@pytest.mark.parametrize("more", [{}, {"search": "halving", "rates": [1e-3, 1e-2, 1e-1, 1.0]}, {"rates": [1e-3]}])
def test_what_is_expected_is_what_comes(more):
    made = study(extend=0, **more)
    _, order = played(made, near(1e-2))
    assert sorted(c.steps for c in expected(made, {}, LENGTHS)) == sorted(c.steps for c in order if c.key in {
        d.key for d in order} and (not c.test or c.seed != 0 or more.get("rates") == [1e-3] or not c.steps or "search" in more))


# What a study is

@pytest.mark.parametrize("values,part", [
    ({"methods": ["lorra"]}, "no method is called 'lorra'; did you mean 'lora'?"),
    ({"methods": []}, "methods: there must be at least one"),
    ({"methods": [{"name": "lora", "rnk": 4}]}, "method.rnk: lora has no such setting"),
    ({"rates": [0.0]}, "rates: 0 is out of range"),
    ({"methods": ["lora", "lora"]}, "lora is there twice"), ({"seeds": [1, 1]}, "seeds: one of them is there twice"),
    ({"train": {"lr": 1e-3}}, "train.lr: a study sets it itself; give rates"), ({"method": {"name": "lora"}}, "give methods"),
    ({"datasets": {"a/b": {}}}, "datasets.a/b: a name is made of"),
    ({"datasets": {"a": {"train": {"seed": 1}}}}, "datasets.a.train.seed"),
    ({"datasets": {"a": {"data": {"files": []}}}}, "datasets.a.data.files: no training data"),
    ({"trian": {}}, "trian: unknown key"),
    ({"search": "random"}, "search: 'random' is not one of grid, halving")])
def test_a_wrong_study_is_refused_in_one_line(values, part):
    with pytest.raises(UserError) as error:
        study(**values)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_lists_in_a_methods_fields_are_axes_and_a_list_of_texts_is_one_value():
    made = study(methods=[{"name": "lora", "rank": [4, 16], "targets": ["q", "v"]}, "full"])
    assert [v.label for v in made.variants()] == ["lora rank=4 targets=q,v", "lora rank=16 targets=q,v", "full"]
    assert method_of("lora:rank=4,16:rslora=true") == {"name": "lora", "rank": [4, 16], "rslora": True}


def test_a_size_is_the_nearest_to_the_budget_for_every_method_that_has_one(base):
    run = {"base": base}
    for name in METHODS:
        field = size_field(name)
        if field is None:
            assert nearest(run, Variant(name), 5000) == Variant(name)
            continue
        found = nearest(run, Variant(name), 5000)
        trains, size = count(run, found)[1], found.fields[field]
        for other in (size - 1, size + 1):
            try:
                near_it = count(run, Variant(name, {field: other}))[1]
            except UserError:
                continue
            if (near_it > trains) == (other > size):  # a factor that is trained whole from some size on grows no further
                assert abs(near_it - 5000) >= abs(trains - 5000), (name, size, trains, other, near_it)
    lora = nearest(run, Variant("lora"), 5000)
    assert lora.fields["rank"] != 8 and abs(count(run, lora)[1] - 5000) <= 1024


# Statistics

def test_quantiles_are_students():
    for df, want in ((1, 12.706205), (2, 4.302653), (10, 2.228139), (1000, 1.962339)):
        assert abs(quantile(0.975, df) - want) < 1e-5


def test_a_paired_difference_is_the_plain_formula():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.rand(3, 40, generator=draw, dtype=torch.float64), torch.rand(3, 40, generator=draw, dtype=torch.float64)
    found, d = difference(a.tolist(), b.tolist()), a - b
    rows, seeds = d.mean(0).var() / 40, d.mean(1).var() / 3
    assert abs(found.value - d.mean()) < 1e-12 and abs(found.error - (rows + seeds).sqrt()) < 1e-12
    assert abs(found.df - (rows + seeds) ** 2 / (rows ** 2 / 39 + seeds ** 2 / 2)) < 1e-9
    assert found.error < mean_of(a.tolist()).error + mean_of(b.tolist()).error
    shared = difference(a.tolist(), b.tolist(), Pool(1.0, 20))
    assert abs(shared.error - (rows + 2.0 / 3).sqrt()) < 1e-12


def scored(rng: random.Random, level: float, hard: list[float], noise: float, seeds: int = 3) -> dict[int, list[float]]:
    """Right or wrong on rows of which some are hard, for runs that differ by their seed."""
    found = {}
    for s in range(seeds):
        p = level + rng.gauss(0, noise)
        found[s] = [float(rng.random() < min(1, max(0, p + h))) for h in hard]
    return found


def test_equal_methods_are_tied_and_a_better_one_is_not():
    """Of 150 studies with eight equal methods, few call any pair different; a method 15 points better is found almost always."""
    rng, wrong, missed = random.Random(0), 0, 0
    for _ in range(150):
        hard = [rng.gauss(0, 0.25) for _ in range(60)]
        tables = {str(i): scored(rng, 0.6, hard, 0.03) for i in range(8)}
        wrong += any(p is not None and p < 0.05 for _, p in compared(tables).values())
    for _ in range(20):
        hard = [rng.gauss(0, 0.25) for _ in range(300)]
        tables = {"good": scored(rng, 0.8, hard, 0.02)} | {str(i): scored(rng, 0.6, hard, 0.02) for i in range(5)}
        missed += ranks(list(tables), compared(tables), True)["good"] != (1, 1)
    assert wrong <= 15 and missed <= 2, (wrong, missed)


def test_one_seed_and_no_rows_is_no_test_and_holm_is_holms():
    pairs = compared({"a": {0: [0.9]}, "b": {0: [0.1]}})
    assert pairs["a", "b"][1] is None and ranks(["a", "b"], pairs, True) == {"a": (1, 2), "b": (1, 2)}
    low, high = mean_of([[1.0] * 12]).interval
    assert low < 0.9 and high > 1 - 1e-9 and mean_of([[0.0] * 12]).error > 0.05
    assert pool({"a": {0: [0.9]}}) is None and mean_of([[0.9]]).interval is None
    assert holm({"x": 0.01, "y": 0.04, "z": 0.03}) == pytest.approx({"x": 0.03, "z": 0.06, "y": 0.06})


# A whole study

def flags(base: str, rows: str, out: Path, *more: str) -> list[str]:
    return ["compare", "--base", base, "--data", rows, "--out", str(out), "--dtype", "fp32", "--batch-size", "4", "--steps", "6",
            "--metric", "exact", "--set", "eval.max_new_tokens=3", "--curve-points", "2", "--holdout", "0.3", *more]


@pytest.fixture(scope="module")
def finished(base, rows, tmp_path_factory):
    """A study of two methods and the base trained whole, with a rate that diverges: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("study") / "out"
    more = ["--methods", "lora:rank=4", "bitfit", "full", "--rates", "0.03", "1e30", "--seeds", "0", "1", "--general",
            f"{rows}.txt"]
    done = subprocess.run([sys.executable, "-m", "tsugiki.cli.main", *flags(base, rows, out, *more, "--json")], capture_output=True,
                          text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def environment() -> dict:
    import os
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}


def test_a_study_ranks_trains_full_too_and_a_diverging_rate_is_a_row(finished):
    out, found, said = finished
    methods = found["data"]["data"]["methods"]
    assert {m["method"] for m in methods} == {"lora rank=4", "bitfit", "full"} and all(m["seeds"] == 2 for m in methods)
    assert all(m["interval"][0] <= m["score"] <= m["interval"][1] and m["rate"] < 1 for m in methods)
    assert all(m["measured"]["memory_bytes"] > 1e7 and m["trainable"] > 0 for m in methods)
    assert any(m["forgetting"] != 0 for m in methods)
    assert found["failures"] and all("rate 1e+30" in line for line in found["failures"]) and "failed: step" in said
    table = (out / "results.csv").read_text().splitlines()
    assert sum("search" in line for line in table) == 3 and sum(",final," in line for line in table) == 6 and len(table) == 10
    text = (out / "results.md").read_text()
    assert "Runs that failed" in text and "The base alone" in text and "Holm" in text
    assert (out / "runs/data/lora-rank=4").is_dir() and not list((out / "runs").rglob("checkpoints"))
    assert len(list((out / "runs").rglob("adapter"))) == 4 and len(list((out / "runs").rglob("model"))) == 2


def test_a_finished_study_makes_nothing_again_and_may_get_another_seed(finished, base, rows, capsys):
    out, found, _ = finished
    kept = {p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.json")}
    more = ["--methods", "lora:rank=4", "bitfit", "--rates", "0.03", "1e30", "--general", f"{rows}.txt",
            "--seeds", "0", "1"]
    assert main(flags(base, rows, out, *more, "--json", "--quiet")) == 0
    again = json.loads(capsys.readouterr().out)
    assert {p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.json")} == kept
    assert [m for m in again["data"]["data"]["methods"] if m["method"] == "bitfit"][0]["score"] == [
        m for m in found["data"]["data"]["methods"] if m["method"] == "bitfit"][0]["score"]
    assert main(flags(base, rows, out, *more, "2", "--quiet")) == 0
    assert "lr-0.03-seed-2" in "".join(str(p) for p in (out / "results").rglob("*.json") if p not in kept)
    for change, key in ((("--steps", "7"), "train.steps"), (("--holdout", "0.4"), "data.holdout")):
        assert main([*flags(base, rows, out, *more), *change]) == 2
        assert key in capsys.readouterr().err


def test_scores_are_those_of_the_library_on_the_kept_adapter(finished, base, rows):
    import tsugiki as tg
    from tsugiki.compare.rows import read_parts
    out, found, _ = finished
    import yaml
    made = study_of({k: v for k, v in yaml.safe_load((out / "study.yaml").read_text()).items() if k not in ("rows_sha256", "run")}
                    | yaml.safe_load((out / "study.yaml").read_text())["run"])
    parts = read_parts(made, "data")
    path = sorted((out / "results/data/lora-rank=4").glob("*seed-1*.json"))[0]
    result = json.loads(path.read_text())
    model, tokenizer = tg.load(base, dtype="fp32")
    tg.attach(model).load("a", out / "runs/data/lora-rank=4" / path.stem / "adapter")
    score = tg.evaluate(model, tokenizer, parts.test, adapter="a", metric="exact", max_new_tokens=3)
    assert score.value == result["test"]["accuracy"] and abs(score.loss - result["test"]["loss"]) < 1e-6
    assert not {c.where for c in parts.test} & {c.where for c in (*parts.train, *parts.validation)}
    assert not {c.where for c in parts.train} & {c.where for c in parts.validation}


def test_a_plan_trains_nothing_and_counts_the_runs(base, rows, tmp_path, capsys):
    assert main(flags(base, rows, tmp_path / "out", "--methods", "lora", "ia3", "--plan", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 11 and found["seconds"] > 0 and found["methods"]["lora"]["trainable"] > 0
    assert not (tmp_path / "out").exists()


def test_a_study_killed_ten_times_at_random_moments_ends_with_the_same_table(base, rows, tmp_path):
    """And what is left then is shared by two processes."""
    script = Path(__file__).with_name("kill_study.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path), base, rows, "1", "10"], capture_output=True, text=True,
                          timeout=600, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["identical"] == found["studies"] == 1 and found["kills"] == 10 and found["landed"] >= 6, found


def test_a_plan_in_the_library_needs_no_more_than_the_study(base, rows, tmp_path):
    made = study_of({"out": str(tmp_path / "s"), "base": base, "methods": ["lora"], "data": {"files": [rows]},
                     "train": {"steps": 3}})
    made, parts, plan = prepare(made, lambda line: None, save=False)
    assert plan.lengths.width == planned(made, parts, {}).lengths.width == llama().config.hidden_size
    assert plan.loads["data"].steps == 3 and plan.left(plan.cells, {}) > 0

"""The speed benchmark runs, counts what it says it counts, and fails when a side does not train or trains something else."""
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import train_speed  # noqa: E402
from speed import report, shapes  # noqa: E402
from speed.sides import SIDES  # noqa: E402


def command(folder: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_speed.py"), "--shape", "tiny", "--steps", "2", "--warmup", "1",
         "--threads", "1", "--batch-size", "4", "--work", str(folder / "work"), "--json", str(folder / "found.json"),
         "--turns", "step", *more],
        capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("peft")
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("speed")
    done = command(folder, "--sides", "tsugiki", "trainer")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((folder / "found.json").read_text()).values()
    return done, result


def test_one_command_measures_both_sides_on_the_same_tokens_with_losses_that_agree(found):
    done, result = found
    assert "no --data-dir" in done.stderr and result["data"] == "synthetic" and not result["wrong"]
    ours, theirs = result["sides"]["tsugiki"], result["sides"]["trainer"]
    assert ours["tokens"] == theirs["tokens"] > 0 and len(ours["seconds"]) == len(theirs["seconds"]) == 2
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3) and len(set(ours["losses"])) == 3
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=0.2) and ours["norm"] > 0
    for side in (ours, theirs):
        assert 0 < side["base_gb"] < side["peak_gb"] and side["min"] <= side["tokens_per_second"] <= side["max"]
        assert 0 < side["share"] < 1 and side["first"] > max(side["seconds"])
    for name in ("tsugiki", "trainer"):
        assert SIDES[name] in done.stdout


def test_the_page_says_where_a_peer_is_better_and_only_there(found, monkeypatch):
    generation = {"tiny": {"sides": {"here": {"here_is_faster": 1.0}, "peer": {"here_is_faster": 0.5}}}}
    monkeypatch.setattr(report, "_results", lambda name: generation if name == "generate_speed" else {})
    monkeypatch.setattr(report, "_generation", lambda: [])
    result = copy.deepcopy(found[1])
    better = result["sides"]["trainer"] = result["sides"]["tsugiki"] | {"ratio": 0.5}
    page = report.page({"key": result})
    assert f"{SIDES['trainer']} is 2.00 times as fast" in page and "GB at the peak" not in page
    assert "Generation, tiny: peer is 2.00 times as fast" in page
    better["ratio"] = generation["tiny"]["sides"]["peer"]["here_is_faster"] = 2.0
    assert "In nothing that is measured so far" in report.page({"key": result})


def test_runs_of_some_sides_join_under_the_same_conditions_only(found, tmp_path):
    path, ours, theirs = tmp_path / "r.json", copy.deepcopy(found[1]), copy.deepcopy(found[1])
    del ours["sides"]["trainer"], theirs["sides"]["tsugiki"]
    report.merge(path, theirs)
    report.merge(path, ours)
    (joined,) = json.loads(path.read_text()).values()
    assert joined["sides"] == found[1]["sides"] and joined["sides"]["trainer"]["ratio"] > 0
    report.merge(path, ours | {"batch_size": 8})
    report.merge(path, ours | {"preload": "libother.so"})
    assert [list(r["sides"]) for r in json.loads(path.read_text()).values()] == [["tsugiki"], ["tsugiki"]]


def steps(n: int = 3, **values) -> dict:
    made = [{"seconds": 1.0, "tokens": 40, "supervised": 20, "loss": 6.0, "norm": 0.1} for _ in range(n)]
    made[-1] |= values
    return {"warm": made[:1], "steps": made[1:]}


@pytest.mark.parametrize(("side", "said"), [
    (steps(norm=0.0), "nothing is trained"), (steps(norm=float("nan")), "nothing is trained"),
    (steps(loss=500.0), "the loss of step 3 is 500"),
    (steps(tokens=41), "saw 40 tokens"), (steps(supervised=21), "trained 20"), (steps(loss=6.5), "apart"),
    ({"error": "trainer ended with -9"}, "ended with -9"),
])
def test_a_side_that_does_not_train_or_trains_something_else_is_named(side, said):
    assert train_speed.check({"tsugiki": steps(), "trainer": steps()}) == []
    assert any(said in line for line in train_speed.check({"tsugiki": steps(), "trainer": side}))


def test_a_side_that_dies_fails_the_command_and_leaves_the_results_alone(tmp_path):
    broken = tmp_path / "work" / "base-tiny"
    broken.mkdir(parents=True)
    (broken / "done").touch()
    done = command(tmp_path, "--sides", "tsugiki")
    assert done.returncode == 1 and "FAILED: tsugiki" in done.stderr and "config.json" in done.stderr
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_the_linears_counted_are_the_models_own(shape):
    kind, values = shapes.SHAPES[shape]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shapes.COMMON | values))
    own = sorted((m.out_features, m.in_features) for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert own == sorted((n, k) for _, n, k, times in shapes.linears(shape) for _ in range(times))
    row = ([3] * 7, [4] * 2)                          # ten tokens, three trained
    body = sum(n * k for n, k in own) - values["vocab_size"] * values["hidden_size"]
    attention = 6 * 100 * values["hidden_size"] * values["num_hidden_layers"]
    assert shapes.flops(shape, [row], full=False) == 40 * body + 12 * values["vocab_size"] * values["hidden_size"] + attention


def test_rows_are_the_seeds_and_never_too_long_nor_zeros():
    name, rows = shapes.make_rows("tiny", "gsm8k", None, 200, 128, 0)
    lengths = [len(p) + len(c) + 1 for p, c in rows]
    assert name == "synthetic" and max(lengths) == 128 and len(set(lengths)) > 30
    assert min(min(p + c) for p, c in rows) >= shapes.FIRST_ID and len({i for p, c in rows for i in p + c}) > 400
    assert rows == shapes.make_rows("tiny", "gsm8k", None, 200, 128, 0)[1]
    assert rows != shapes.make_rows("tiny", "gsm8k", None, 200, 128, 1)[1]
    assert {len(p) + len(c) + 1 for p, c in shapes.make_rows("tiny", "full", None, 5, 64, 0)[1]} == {64}

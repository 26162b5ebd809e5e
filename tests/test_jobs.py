"""The jobs of a joint run: what a jobs file may say, whose turn it is, and the command with the folders it leaves."""
import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from kit import TOKENIZER, lines, llama, write

import tsugiki as tg
from tsugiki.cli.main import main
from tsugiki.errors import UserError
from tsugiki.formats.export import export_model
from tsugiki.methods import LoRA
from tsugiki.train.jobs import jobs_of, read_jobs
from tsugiki.train.turns import Turns


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(export_model(llama(), TOKENIZER, tmp_path_factory.mktemp("base") / "base", dtype=torch.float32))


@pytest.fixture
def call(capsys):
    def run(*argv):
        capsys.readouterr()
        code = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err
    return run


def file(folder: Path, values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "jobs.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


GOOD = {"data": "rows.jsonl"}
# what is wrong with the file as a whole -> exit code 2, nothing begins
FILE = {
    "no jobs": ({"base": "x"}, "jobs: expected a list of jobs, or jobs by name"),
    "jobs of a number": ({"jobs": 3}, "jobs: expected a list"),
    "an empty list": ({"jobs": []}, "jobs: expected a list"),
    "an unknown key": ({"job": {"a": GOOD}}, "job: unknown key; did you mean 'jobs'?"),
    "tokens of none": ({"tokens": 0, "jobs": {"a": GOOD}}, "tokens: 0 is out of range, allowed: at least 1"),
    "bits of three": ({"bits": 3, "jobs": {"a": GOOD}}, "bits: 3 is not one of 0, 4, 8"),
    "defaults of a text": ({"defaults": "x", "jobs": {"a": GOOD}}, "defaults: expected keys and values, found 'x'"),
    "no name": ({"jobs": [GOOD]}, "jobs: number 1 has no name"),
    "a job of a text": ({"jobs": ["a"]}, "jobs: number 1 has no name"),
    "a name with a slash": ({"jobs": {"a/b": GOOD}}, "jobs: number 1: name: 'a/b' is not one"),
    "a name upwards": ({"jobs": {"..": GOOD}}, "jobs: number 1: name: '..' is not one"),
    "a taken name": ({"jobs": {"checkpoints": GOOD}}, "name: 'checkpoints' is not one"),
    "two of one name": ({"jobs": [{"name": "a"} | GOOD, {"name": "a"} | GOOD]}, "jobs: two are called a"),
    "two of one folder": ({"jobs": {"a": GOOD, "b": GOOD | {"out": "OUT/a"}}}, "jobs: a and b both have the folder"),
    "another name inside": ({"jobs": {"a": GOOD | {"name": "b"}}}, "jobs: a: name: is 'b' inside"),
    "no YAML": ("jobs: [", ":1: not YAML"),
    "a key twice": ("jobs: {a: {data: x}, a: {data: y}}", "the key 'a' is there twice"),
    "no job is right": ({"jobs": {"a": GOOD | {"train": {"lrr": 1}}}}, "a: train.lrr: unknown key; did you mean 'lr'?"),
}
# what is wrong with one job -> it has failed, the others train
JOB = {
    "an unknown key": ({"trian": {}}, "bad: trian: unknown key; did you mean 'train'?"),
    "an unknown key inside": ({"train": {"lrr": 1}}, "bad: train.lrr: unknown key; did you mean 'lr'?"),
    "a wrong type": ({"train": {"steps": "many"}}, "bad: train.steps: expected int, found 'many'"),
    "a weight of zero": ({"weight": 0}, "bad: weight: 0 is out of range"),
    "a start before the first tick": ({"start": -1}, "bad: start: -1 is out of range"),
    "full fine-tuning": ({"method": "full"}, "bad: method.name: full fine-tuning changes the base, which all jobs share"),
    "a base of its own": ({"base": "other"}, "bad: base: one for all jobs"),
    "an adapter's name": ({"adapter": "other"}, "bad: adapter: the job's name is the adapter's"),
    "compiled": ({"train": {"compile": "on"}}, "bad: train.compile: on is not for a joint run"),
    "no such method": ({"method": "lorra"}, "no method is called 'lorra'; did you mean 'lora'?"),
    "a setting of another method": ({"method": {"name": "bitfit", "rank": 3}}, "bitfit has no such setting"),
    "a target that is not there": ({"method": {"name": "lora", "targets": ["qq"]}}, "no site has the role 'qq'"),
    "no data": ({"data": []}, "data.files: no training data"),
    "a file that is not there": ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    "another precision": ({"train": {"dtype": "bf16"}}, "train.dtype: bf16 is not good's fp32; there is one base"),
    "packing with virtual tokens": ({"method": "prefix", "train": {"layout": "pack"}}, "train.layout: pack is not exact here"),
}


@pytest.mark.parametrize("fault", FILE)
def test_a_mistake_in_the_file_ends_in_one_line_before_anything_begins(fault, tmp_path, call):
    values, reason = FILE[fault]
    text = (values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False)).replace("OUT", str(tmp_path / "out"))
    path = file(tmp_path / "x", text)
    code, out, err = call("train", "--jobs", path, "--out", tmp_path / "out")
    assert code == 2 and reason in err and str(path) in err and err.count("\n") == 1 and not out, err
    assert not (tmp_path / "out").exists()


def test_mistakes_in_some_jobs_are_their_results_in_one_line_each_and_the_others_train(base, tmp_path, call):
    rows = str(write(tmp_path / "rows.jsonl", lines(8)))
    names = {f"bad{n}": fault for n, fault in enumerate(JOB)}
    jobs = {"good": {"data": rows}} | {name: {"data": rows} | JOB[fault][0] for name, fault in names.items()}
    path = file(tmp_path, {"base": base, "defaults": {"train": {"steps": 2, "batch_size": 2, "dtype": "fp32"}}, "jobs": jobs})
    code, out, err = call("train", "--jobs", path, "--out", tmp_path / "out", "--json", "--quiet")
    found = json.loads(out)
    assert code == 1 and list(found["jobs"]) == list(jobs) and set(found["failed"]) == set(names)
    assert found["jobs"]["good"]["steps"] == 2 and (tmp_path / "out" / "good" / "adapter").is_dir()
    for name, fault in names.items():
        said = found["jobs"][name]["failed"]
        assert JOB[fault][1].replace("bad:", f"{name}:") in said and "\n" not in said, (fault, said)
        assert not (tmp_path / "out" / name / "adapter").exists()


@pytest.mark.parametrize("flags, reason", [
    (["--config", "x.yaml"], "--config: is of one run"), (["--jobs", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    (["--set", "train.lrr=1"], "train.lrr: unknown key"), (["--tokens", "some"], "tokens: expected int")])
def test_flags_that_make_no_sense_with_jobs_end_in_one_line(flags, reason, tmp_path, call):
    path = file(tmp_path, {"jobs": {"a": GOOD}})
    code, _, err = call("train", "--jobs", path, "--out", tmp_path / "out", *flags)
    assert code == 2 and reason in err and err.count("\n") == 1


def test_tokens_without_jobs_says_what_is_meant(call):
    code, _, err = call("train", "--data", "x.jsonl", "--out", "y", "--tokens", "9")
    assert code == 2 and "--tokens: is for --jobs" in err


def test_a_jobs_folders_load_and_the_command_given_again_says_the_same(base, tmp_path, call):
    rows, more = [str(write(tmp_path / f"{n}.jsonl", lines(12, n))) for n in (0, 40)]
    path = file(tmp_path, {
        "base": base, "tokens": 500, "defaults": {"train": {"steps": 3, "batch_size": 2, "dtype": "fp32"}, "method": {"rank": 2}},
        "jobs": {"one": {"data": rows, "weight": 2},
                 "two": {"data": {"files": more, "holdout": 0.3}, "method": "prefix", "eval": {"max_new_tokens": 3}}}})
    code, out, err = call("train", "--jobs", path, "--out", tmp_path / "out", "--set", "train.seed=3")
    assert code == 0 and "one" in out and "accuracy" in out and "finished after 3 steps" in err
    again = call("train", "--jobs", path, "--out", tmp_path / "out", "--set", "train.seed=3")
    assert again[:2] == (code, out) and "first step" not in again[2]
    for name in ("one", "two"):
        folder = tmp_path / "out" / name
        assert {p.name for p in folder.iterdir()} == {"adapter", "checkpoints", "metrics.jsonl", "report.html", "run.yaml"}
        assert yaml.safe_load((folder / "run.yaml").read_text())["train"]["seed"] == 3
        code, out, _ = call("eval", "--base", base, "--adapter", folder / "adapter", "--data", rows, "--metric", "loss", "--json",
                            "--dtype", "fp32")
        assert code == 0 and json.loads(out)["n"] == 12
        code, out, _ = call("generate", "--base", base, "--adapter", folder / "adapter", "--prompt", "one and", "--dtype", "fp32",
                            "--max-new-tokens", 3)
        assert code == 0
    alone = tmp_path / "out" / "one"
    assert yaml.safe_load((alone / "run.yaml").read_text())["method"]["rank"] == 2
    assert "rank" not in yaml.safe_load((tmp_path / "out" / "two" / "run.yaml").read_text())["method"], "another method's setting"


def test_the_library_trains_many_and_returns_them_by_name(tmp_path):
    model, rows = llama(), str(write(tmp_path / "rows.jsonl", lines(8)))
    jobs = [{"name": "b", "data": rows, "method": LoRA(rank=2, targets=("q", "v")), "train": {"steps": 2}, "weight": 2},
            {"name": "a", "data": "nowhere.jsonl"},
            {"name": "c", "data": [rows], "method": {"name": "bitfit"}, "train": {"steps": 1}}]
    found = tg.train_many(model, TOKENIZER, jobs, tmp_path / "out", quiet=True)
    assert list(found) == ["b", "a", "c"] and isinstance(found["a"], tg.Failure) and "nowhere" in found["a"].reason
    assert found["b"].progress.step == 2 and found["c"].trainable > 0
    adapters = tg.attach(model)
    adapters.load("b", found["b"].saved)
    assert adapters.get("b").cfg.targets == ("q", "v") or adapters.get("b").cfg.rank == 2
    with pytest.raises(UserError, match="two are called b"):
        tg.train_many(model, TOKENIZER, [jobs[0], jobs[0]], tmp_path / "other", quiet=True)
    with tg.Joint(model, TOKENIZER, tmp_path / "live", quiet=True) as joint:
        joint.add({"name": "d", "data": rows, "train": {"steps": 3}})
        assert joint.tick() == ["d"] and joint.jobs["d"].steps.progress.step == 1
        with pytest.raises(UserError, match="d: a job of this name is there"):
            joint.add({"name": "d", "data": rows})
        with pytest.raises(UserError, match="e: train.lr: expected float"):
            joint.add({"name": "e", "data": rows, "train": {"lr": "fast"}})
        assert joint.run()["d"].progress.step == 3


def test_defaults_lie_under_each_job_and_flags_over_it(tmp_path):
    path = file(tmp_path, {"out": "runs", "defaults": {"method": {"name": "lora", "rank": 3}, "train": {"lr": 0.1, "steps": 5}},
                           "jobs": [{"name": "a", "data": "x"}, {"name": "b", "data": ["y", "z"], "method": "lora"},
                                    {"name": "c", "data": "x", "method": "bitfit", "train": {"lr": 0.2}, "weight": 2, "start": 4}]})
    found = read_jobs(str(path), {"train": {"steps": 7}, "out": "elsewhere"})
    a, b, c = found.jobs
    assert [j.run.out for j in found.jobs] == [str(Path("elsewhere") / n) for n in "abc"]
    assert a.run.method == b.run.method == {"name": "lora", "rank": 3} and c.run.method == {"name": "bitfit"}
    assert (a.run.train.lr, c.run.train.lr, a.run.train.steps, c.turn.weight, c.turn.start) == (0.1, 0.2, 7, 2.0, 4)
    assert b.run.data.files == ["y", "z"] and a.run.adapter == "a"


def test_jobs_may_be_given_as_a_mapping_or_a_list():
    by_name, _, names = jobs_of({"a": {"data": "x"}, "b": {"data": "y"}}, "out")
    listed, _, _ = jobs_of([{"name": "a", "data": "x"}, {"name": "b", "data": "y"}], "out")
    assert by_name == listed and names == ("a", "b")


# Turns

def played(costs: dict[str, int], weights: dict[str, float], budget: int, ticks: int) -> tuple[Turns, list[list[str]]]:
    turns, seen = Turns(), []
    for _ in range(ticks):
        chosen = turns.choose(costs, budget)
        turns.charge(costs, chosen, weights)
        seen.append(chosen)
    return turns, seen


def drawn(seed: int, scales=(1, 10, 100, 1000), by=(0.1, 0.5, 1, 1, 3, 10)) -> tuple[dict[str, int], dict[str, float], int]:
    rng = random.Random(seed)
    names = [f"j{n}" for n in range(rng.randint(2, 9))]
    costs = {n: rng.choice(scales) * rng.randint(1, 9) for n in names}
    return costs, {n: rng.choice(by) for n in names}, rng.randint(1, max(sum(costs.values()) - 1, 1))


@pytest.mark.parametrize("seed", range(30))
def test_no_job_waits_longer_than_its_bound(seed):
    costs, weights, budget = drawn(seed)
    spread = max(costs[n] / weights[n] for n in costs)
    for name in costs:
        bound = sum(1 + (costs[name] / weights[name] + spread) * weights[k] / costs[k] for k in costs if k != name)
        _, seen = played(costs, weights, budget, min(3000, int(3 * bound) + 5))
        waits, waited = [], 0
        for chosen in seen:
            waited = 0 if name in chosen else waited + 1
            waits.append(waited)
        assert max(waits) <= bound, (name, max(waits), bound)


@pytest.mark.parametrize("seed", range(30))
def test_tokens_are_shared_by_weight_and_the_budget_is_kept(seed):
    costs, weights, budget = drawn(seed, scales=(1, 3), by=(1, 2, 3))
    spread = max(costs[n] / weights[n] for n in costs)
    _, seen = played(costs, weights, budget, 2000)
    had = dict.fromkeys(costs, 0)
    for chosen in seen:
        assert chosen and (len(chosen) == 1 or sum(costs[n] for n in chosen) <= budget)
        for name in chosen:
            had[name] += costs[name]
    waiting = [n for n in costs if sum(n in chosen for chosen in seen) < 0.9 * len(seen)]
    shares = [had[n] / weights[n] for n in waiting]
    assert max(shares) - min(shares) <= 2 * spread < max(shares) / 10


def test_where_all_fit_all_step_and_a_step_larger_than_the_budget_is_taken():
    _, seen = played({"a": 5, "b": 7}, {"a": 1.0, "b": 9.0}, 12, 4)
    assert seen == [["a", "b"]] * 4
    _, seen = played({"a": 500, "b": 7}, {"a": 1.0, "b": 1.0}, 12, 90)
    assert seen.count(["a"]) == 2 and seen.count(["b"]) == 88


def test_a_new_job_neither_waits_for_the_past_nor_catches_up_with_it():
    costs, weights = {"a": 10, "b": 10}, {"a": 1.0, "b": 1.0, "c": 1.0}
    turns, _ = played(costs, weights, 10, 100)
    seen = []
    for _ in range(6):
        chosen = turns.choose(costs | {"c": 10}, 10)
        turns.charge(costs | {"c": 10}, chosen, weights)
        seen += chosen
    assert sorted(seen) == ["a", "a", "b", "b", "c", "c"]


def test_a_share_that_a_job_cannot_use_becomes_no_claim_on_the_others():
    costs, weights = {"small": 1, "a": 100, "b": 100}, {"small": 50.0, "a": 1.0, "b": 1.0}
    turns, seen = played(costs, weights, 101, 500)
    assert all("small" in chosen for chosen in seen) and len({tuple(chosen) for chosen in seen}) == 2
    later = []
    for _ in range(30):
        chosen = turns.choose(costs | {"late": 100}, 101)
        turns.charge(costs | {"late": 100}, chosen, weights | {"late": 1.0})
        later += chosen
    assert max(later.count(n) for n in ("a", "b", "late")) - min(later.count(n) for n in ("a", "b", "late")) <= 3


def test_whose_turn_it_is_is_a_function_of_the_accounts():
    costs, weights, budget = drawn(4)
    whole, _ = played(costs, weights, budget, 50)
    half, _ = played(costs, weights, budget, 20)
    again = Turns(json.loads(json.dumps(half.accounts)))
    for _ in range(30):
        chosen = again.choose(costs, budget)
        again.charge(costs, chosen, weights)
    assert again.accounts == whole.accounts

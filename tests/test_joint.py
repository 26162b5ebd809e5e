"""Joint training: each job is what it would be alone, whatever the others are or suffer; killed and resumed as one."""
import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from joint_kit import (
    FAULTS,
    NAMES,
    alone,
    attached_only,
    bits,
    budget,
    draw,
    in_forward,
    joint,
    lines,
    model,
)
from kit import TOKENIZER, left, llama, newest, same
from tiny import EXACT, difference

from tsugiki.errors import UserError
from tsugiki.train import checkpoint
from tsugiki.train import joint as joint_module
from tsugiki.train.failure import Failure
from tsugiki.train.jobs import Turn
from tsugiki.train.joint import Joint
from tsugiki.train.loop import Interrupted

ALL = range(50)


@pytest.mark.share(7)
@pytest.mark.parametrize("seed", ALL)
def test_jobs_trained_together_are_what_each_trains_alone(seed, tmp_path):
    jobs = draw(seed, tmp_path)
    made = joint(jobs, budget(seed))
    assert all(not isinstance(r, Failure) for r in made.results.values()), made.results
    trained, before = bits(made), model().state_dict()
    for job in jobs:
        want = alone(job, tmp_path / "alone")
        got = trained[job.name]
        assert got.keys() == want.keys()
        worst = max(difference(got[k], want[k]) for k in want)
        assert worst <= EXACT, (job, worst)
        result = made.results[job.name]
        assert result.progress.step <= job.run.train.steps and (result.out / "report.html").is_file()
    assert attached_only(made, set()) and same({k: v for k, v in made.model.state_dict().items()}, before)


def test_the_schedules_draw_every_method(tmp_path):
    """And of several jobs no two train the same tensors: the comparison can fail."""
    counts = [len(draw(seed, tmp_path / str(seed))) for seed in ALL]
    drawn = [{NAMES[(4 * seed + n) % len(NAMES)] for n in range(count)} for seed, count in zip(ALL, counts, strict=True)]
    assert set().union(*drawn) == set(NAMES) and {1, 16} < set(counts)
    assert len(set().union(*drawn[::7])) > len(NAMES) / 2, "a usual run leaves most methods out"


def faulty(seed: int, kind: str, folder: Path, patch) -> tuple[Joint, int]:
    """A joint run with a fault in its first job, and the tick in which that job stopped."""
    put, _, _ = FAULTS[kind]
    when, ticks, fault = random.Random(seed).randint(0, 2), [], []

    def at(made: Joint) -> None:
        if "job0" in made.jobs:
            ticks.append(made.now)
            if made.now >= when and made.jobs["job0"].begun and not fault:
                fault.append(True)
                put(made, "job0", patch)
    made = joint(jobs_with(seed, folder, kind), budget(seed), at)
    return made, ticks[-1]


def jobs_with(seed: int, folder: Path, kind: str):
    """At least two jobs, the first long enough to be caught in the middle, and looking where the fault is in its looks."""
    sure = {"steps": 4} | ({"eval_steps": 1} if "evaluation" in kind else {"eval_steps": 0})
    sure |= {"patience": 0, "keep": "last"}
    while len(jobs := draw(seed, folder, most=6, sure=sure)) < 2:
        seed += 100
    return [dataclasses.replace(jobs[0], turn=dataclasses.replace(jobs[0].turn, start=0)), *jobs[1:]]


@pytest.mark.share(7)
@pytest.mark.parametrize("seed", ALL)
def test_a_fault_in_one_job_stops_it_alone_and_changes_no_bit_of_the_others(seed, tmp_path, monkeypatch):
    kind = list(FAULTS)[seed % len(FAULTS)]
    _, reason, with_it = FAULTS[kind]
    with monkeypatch.context() as patch:
        made, tick = faulty(seed, kind, tmp_path / "faulty", patch)
    found = made.results["job0"]
    assert isinstance(found, Failure) and re.search(reason, found.reason) and "\n" not in found.reason, found
    others = [name for name in made.results if name != "job0"]
    assert others and not any(isinstance(made.results[name], Failure) for name in others)
    gone, with_it = [], with_it or "its weights" in found.reason           # found as a tick without it was saved

    def at(made: Joint) -> None:
        if made.now >= tick + with_it and not gone:
            gone.append(True)
            if "job0" in made.jobs:
                made.remove("job0")
    want = joint(jobs_with(seed, tmp_path / "without", kind), budget(seed), at)
    for name in others:
        assert same(bits(made)[name], bits(want)[name]), f"{kind} changed {name}"
        assert lines(made)[name] == lines(want)[name]
    if found.step and "disk" not in kind:
        assert newest(found.out).name == f"step-{found.step:08d}"
        assert (found.out / "adapter" / "adapter_model.safetensors").is_file()
        assert all(torch.isfinite(t).all() for t in checkpoint.read(checkpoint.newest(found.out / "checkpoints")).tensors.values())


def test_bad_data_in_one_job_is_its_result_and_the_others_train_the_same_bits(tmp_path):
    jobs = draw(3, tmp_path, most=4)
    want = bits(joint(jobs[1:]))
    again = draw(3, tmp_path / "again", most=4)
    Path(again[0].run.data.files[0]).write_text('{"prompt": "a"}\n')
    made = joint(again)
    assert isinstance(made.results["job0"], Failure) and "job0.jsonl:1" in made.results["job0"].reason
    assert want.keys() == bits(made).keys() and all(same(want[n], bits(made)[n]) for n in want)


def test_when_nobody_is_at_fault_alone_the_tick_is_taken_with_a_forward_for_each(tmp_path, monkeypatch):
    jobs = draw(3, tmp_path, most=4)
    want = bits(joint(jobs))
    plain, mixed = joint_module.gradients, []

    def picky(model, batches, parts, **route):
        if len({int(n) for b in batches for n in b.owners.unique() if n >= 0}) > 1 and any(
                len({int(n) for n in b.owners.unique() if n >= 0}) > 1 for b in batches):
            mixed.append(True)
            raise RuntimeError("will not mix")
        return plain(model, batches, parts, **route)
    monkeypatch.setattr(joint_module, "gradients", picky)
    made = joint(draw(3, tmp_path / "apart", most=4))
    assert mixed and all(difference(bits(made)[n][k], t) <= EXACT for n in want for k, t in want[n].items())


def test_out_of_memory_of_a_forward_of_many_halves_it_and_nobody_stops(tmp_path, monkeypatch):
    jobs = draw(3, tmp_path, most=4)
    want = bits(joint(jobs))
    plain, refused = joint_module.gradients, []

    def tight(model, batches, parts, **route):
        if max(b.ids.numel() for b in batches) > 40:
            refused.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, batches, parts, **route)
    monkeypatch.setattr(joint_module, "gradients", tight)
    made = joint(draw(3, tmp_path / "tight", most=4))
    assert refused and made.forward <= 40 and list(bits(made)) == list(want)
    assert all(difference(bits(made)[n][k], t) <= EXACT for n in want for k, t in want[n].items())


# Killed and resumed

def everything(made: Joint) -> dict:
    """What a joint run leaves that must not depend on when it was stopped."""
    return {name: {k: v for k, v in left(r.out).items()} | {"result": r.plain() | {"seconds": 0, "out": 0, "saved": 0, "report": 0}}
            for name, r in made.results.items()}


def stop_at(tick: int):
    class Killed(BaseException):
        pass

    def at(made: Joint) -> None:
        if made.now >= tick:
            raise Killed
    return at, Killed


@pytest.mark.share(3)
@pytest.mark.parametrize("seed", range(12))
def test_killed_at_any_tick_and_resumed_it_ends_in_the_same_bits(seed, tmp_path):
    want = everything(joint(draw(seed, tmp_path / "whole"), budget(seed)))
    rng, last = random.Random(seed), 0
    for _ in range(2):                                # twice, each time some ticks later: jobs are finished before, or not begun
        last += rng.randint(1, 3)
        at, killed = stop_at(last)
        try:
            joint(draw(seed, tmp_path / "run"), budget(seed), at)
        except killed:
            pass
    made = joint(draw(seed, tmp_path / "run"), budget(seed))
    assert everything(made) == want
    names = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*"))
    assert names == sorted(str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole").rglob("*"))
    again = joint(draw(seed, tmp_path / "run"), budget(seed))
    assert everything(again) == want and again.now == made.now, "a finished joint run given again trains nothing"


def test_a_failed_job_stays_failed_while_others_go_on_and_is_tried_again_when_they_are_through(tmp_path, monkeypatch):
    settings = {"steps": 4, "eval_steps": 0, "patience": 0, "keep": "last"}
    jobs = [dataclasses.replace(job, turn=Turn(), run=dataclasses.replace(job.run, train=dataclasses.replace(
        job.run.train, **settings))) for job in draw(5, tmp_path, most=4)]
    want = alone(jobs[0], tmp_path / "alone")
    put = in_forward(torch.OutOfMemoryError("CUDA out of memory"))

    def at(made: Joint) -> None:
        if made.now == 1:
            put(made, "job0", monkeypatch)
        if made.now == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        joint(jobs, at=at)
    monkeypatch.undo()
    made = joint(jobs)
    assert isinstance(made.results["job0"], Failure) and "no memory" in made.results["job0"].reason
    assert len(bits(made)) == len(jobs) - 1
    again = joint(jobs)
    assert max(difference(bits(again)["job0"][k], want[k]) for k in want) <= EXACT, "from the step it stood at, in its folder"


def test_a_job_added_when_it_goes_on_is_as_one_added_at_that_tick(tmp_path):
    def late(folder: Path):
        jobs = draw(3, folder, most=4)
        return jobs[:-1], jobs[-1]
    first, more = late(tmp_path / "live")

    def add(made: Joint) -> None:
        if made.now == 2 and more.name not in made.jobs | made.results:
            made.add(more)
    want = everything(joint(first, at=add))
    assert more.name in want
    first, more = late(tmp_path / "run")
    at, killed = stop_at(2)
    with pytest.raises(killed):
        joint(first, at=at)
    assert everything(joint([*first, more])) == want


def test_a_checkpoint_that_a_kill_left_too_many_is_pruned_when_it_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "prune", lambda root, keep: None)          # as if killed before it, at the last save of all
        made = joint(draw(3, tmp_path, most=2))
    root = Path(made.out) / "checkpoints"
    assert len(list(root.glob("step-*"))) > 1
    joint(draw(3, tmp_path, most=2))
    assert len(list(root.glob("step-*"))) == 1


def test_what_a_kill_before_the_first_checkpoint_left_is_gone_on_from(tmp_path, monkeypatch):
    jobs = draw(3, tmp_path / "run", most=2)
    want = everything(joint(draw(3, tmp_path / "whole", most=2)))
    def kill(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:                  # as soon as the first job's folder is there
        m.setattr(sys.modules["tsugiki.train.joint"], "Running", kill)
        with pytest.raises(KeyboardInterrupt):
            joint(jobs)
    assert (Path(jobs[0].run.out) / "run.yaml").is_file()
    assert everything(joint(jobs)) == want


def test_a_job_taken_out_of_the_list_is_dropped_and_its_folder_stays(tmp_path):
    jobs = draw(3, tmp_path, most=4)
    at, killed = stop_at(1)
    with pytest.raises(killed):
        joint(jobs, at=at)
    out = Path(jobs[0].run.out)
    before = sorted(p.name for p in out.iterdir())
    made = joint(jobs[1:])
    assert jobs[0].name not in made.results and sorted(p.name for p in out.iterdir()) == before


def test_a_job_removed_and_added_again_goes_on_from_where_it_stood(tmp_path):
    jobs = draw(3, tmp_path, most=4)
    want = alone(jobs[0], tmp_path / "alone")
    steps = []

    def at(made: Joint) -> None:
        if made.now == 1 and not steps:
            made.remove(jobs[0].name)
            made.add(jobs[0])
            steps.append(True)
    made = joint([dataclasses.replace(j, turn=dataclasses.replace(j.turn, start=0)) for j in jobs], at=at)
    assert steps and max(difference(bits(made)[jobs[0].name][k], want[k]) for k in want) <= EXACT
    with pytest.raises(UserError, match="no unfinished job has this name"):
        made.remove("job0")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_same_jobs_end_in_the_same_bits(signum, tmp_path, monkeypatch):
    want = everything(joint(draw(2, tmp_path / "whole")))
    plain, calls = Joint.tick, []

    def tick(self):
        calls.append(True)
        if len(calls) == 2:
            signal.raise_signal(signum)
        return plain(self)
    monkeypatch.setattr(Joint, "tick", tick)
    jobs = draw(2, tmp_path / "run")

    def start() -> Joint:
        with Joint(model(), TOKENIZER, tmp_path / "run" / "out", quiet=True) as made:
            for job in jobs:
                made.add(job)
            made.run()
        return made
    with pytest.raises(Interrupted, match=rf"{signum.name} at tick 2, .*saved") as caught:
        start()
    assert caught.value.code == 128 + signum
    assert everything(start()) == want


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    want = everything(joint(draw(2, tmp_path / "whole")))
    at, killed = stop_at(2)
    with pytest.raises(killed):
        joint(draw(2, tmp_path / "run"), at=at)
    file = newest(tmp_path / "run" / "out") / "params.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert everything(joint(draw(2, tmp_path / "run"))) == want


def test_joint_runs_killed_at_random_moments_end_in_the_same_bits(tmp_path):
    """A fork server trains in children and kills them with SIGKILL, half of the kills aimed into saves."""
    script = Path(__file__).with_name("kill_server.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path), "2", "joint"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["identical"] == report["runs"] >= 2 and report["kills"] >= 4, report


# The base and the folder

def test_an_adapter_of_the_users_is_left_alone(tmp_path):
    base = model()
    from tsugiki.adapters import attach
    from tsugiki.methods import LoRA
    mine = attach(base).add("mine", LoRA(rank=2))
    kept = {k: t.clone() for k, t in mine.tensors().items()}
    jobs = draw(3, tmp_path, most=4)
    made = joint(jobs, base=base)
    assert attached_only(made, {"mine"}) and attach(base).active == ("mine",) and same(kept, mine.tensors())
    assert all(same(bits(made)[n], t) for n, t in bits(joint(draw(3, tmp_path / "bare", most=4))).items())
    attach(base).add("job0", LoRA(rank=2))
    refused = joint(draw(3, tmp_path / "taken", most=1), base=base)
    assert "an adapter of this name is attached" in refused.results["job0"].reason and attached_only(refused, {"mine", "job0"})


def test_a_folder_of_other_things_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no jobs"):
        Joint(model(), TOKENIZER, tmp_path)


def test_a_job_whose_folder_holds_another_run_fails_and_says_what_differs(tmp_path):
    jobs = draw(3, tmp_path, most=2)
    joint(jobs)
    other = dataclasses.replace(jobs[0].run, train=dataclasses.replace(jobs[0].run.train, lr=0.5))
    made = joint([dataclasses.replace(jobs[0], run=other), *jobs[1:]])
    assert re.search(r"holds another run \(train.lr is .* there, 0.5 here", made.results["job0"].reason)
    assert not any(isinstance(made.results[j.name], Failure) for j in jobs[1:])


def test_every_families_layers_take_rows_of_several_jobs(tmp_path):
    """A model that cannot pack, one with its own attention scaling, one whose MLP flattens its rows."""
    for kind in ("bloom", "gemma2", "opt"):
        def base(kind=kind):
            small = {} if kind == "bloom" else {"num_hidden_layers": 2}
            return llama(torch.float64, kind, **small)
        jobs = [dataclasses.replace(j, run=dataclasses.replace(j.run, train=dataclasses.replace(j.run.train, layout="auto")))
                for j in draw(2, tmp_path / kind, most=3)]
        made = joint(jobs, base=base())
        for job in jobs:
            from kit import go, result_bits
            want = result_bits(go(dataclasses.replace(job.run, out=str(tmp_path / kind / "alone" / job.name)), base()))
            assert max(difference(bits(made)[job.name][k], want[k]) for k in want) <= EXACT, (kind, job.name)

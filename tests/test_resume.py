"""A run stopped anywhere and started again ends in the same bits as one that was never stopped."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit import CASES, config, go, left, llama, newest

from tsugiki.evaluate.score import Score
from tsugiki.train import checkpoint, loop, scoring

# 22 rows in batches of 4: an epoch is 6 steps, the last of 2 rows
STEPS = 9


@pytest.mark.share(3)
@pytest.mark.parametrize("name", CASES)
def test_a_run_stopped_after_any_step_goes_on_to_the_same_bits(name, tmp_path):
    whole = tmp_path / "whole"
    go(config(whole, name))
    want = left(whole)
    assert len(want["metrics"]) == STEPS and len(want["files"]) >= 3
    losses = [line["loss"] for line in want["metrics"]]
    assert losses[-1] < losses[0], "training had no effect"
    for k in (1, 4, 6, 7, 8, 9):
        out = tmp_path / f"stopped-{k}"
        shutil.copytree(whole, out)                    # as a kill right after step k's save leaves it, and some lines more
        for path in (out / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > k:
                shutil.rmtree(path)
        for made in ("adapter", "model"):
            shutil.rmtree(out / made, ignore_errors=True)
        said = []
        go(config(out, name), say=said.append)
        assert left(out) == want, f"stopped after step {k}"
        assert any(f"from step {k} of {STEPS}" in line for line in said) or k == STEPS


def test_evaluations_the_best_weights_and_early_stopping_survive_a_stop(tmp_path, monkeypatch):
    """Scores fall and rise: the best is at step 4, and two worse ones in a row stop the run at step 8."""
    values = {0: 5.0, 2: 4.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5}
    now = {}
    plain = loop.train_step

    def count(*args, **kwargs):
        now["step"] = kwargs["step"]
        return plain(*args, **kwargs)
    monkeypatch.setattr(loop, "train_step", count)

    def scored(model, renderer, rows, cfg, pad, limit, progress=None):
        return Score("loss", values[now["step"]], 6, values[now["step"]])
    monkeypatch.setattr(scoring, "evaluate", scored)

    def started(out, step=0, **more):
        now["step"] = step
        return go(config(out, "lora", held=True, steps=12, eval_steps=2, keep="best", patience=2, **more))
    whole = tmp_path / "whole"
    result = started(whole)
    assert result.progress.step == 8 and result.progress.best_step == 4 and "2 evaluations" in result.progress.stopped
    want = left(whole)
    for k in range(1, 9):
        out = tmp_path / f"stopped-{k}"
        shutil.copytree(whole, out)
        for path in (out / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > k:
                shutil.rmtree(path)
        shutil.rmtree(out / "adapter")
        again = started(out, k)
        assert left(out) == want and again.progress.step == 8, k
    saved = whole / "adapter" / "adapter_model.safetensors"
    last = started(tmp_path / "last-kept" / "run", save_keep=2)
    assert (tmp_path / "last-kept" / "run" / "adapter" / saved.name).read_bytes() == saved.read_bytes(), "best was pruned away"
    assert last.progress.best == 1.0


def damage(path: Path, how: str) -> None:
    file = path / "params.safetensors"
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[:-7])
    elif how == "a bit flipped":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif how == "no manifest":
        (path / "MANIFEST.json").unlink()
    elif how == "manifest cut":
        (path / "MANIFEST.json").write_text((path / "MANIFEST.json").read_text()[:40])
    elif how == "manifest of a list":
        (path / "MANIFEST.json").write_text("[1]")
    elif how == "a file missing":
        (path / "optimizer.safetensors").unlink()
    elif how == "state changed":
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"step": 1}))
    elif how == "empty folder":
        shutil.rmtree(path)
        path.mkdir()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("damage") / "whole"
    go(config(out, "lora+dropout"))
    return out


@pytest.mark.parametrize("how", ["truncated", "a bit flipped", "no manifest", "manifest cut", "manifest of a list",
                                 "a file missing", "state changed", "empty folder"])
def test_a_damaged_newest_checkpoint_is_passed_over_in_one_line(how, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    want = left(finished)
    damage(newest(out), how)
    said = []
    go(config(out, "lora+dropout"), say=said.append)
    skipped = [line for line in said if "skipped checkpoint step-00000009" in line]
    assert len(skipped) == 1 and "\n" not in skipped[0] and any("from step 8 of 9" in line for line in said)
    assert left(out) == want


def test_with_every_checkpoint_damaged_the_run_starts_over_to_the_same_bits(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for path in (out / "checkpoints").glob("step-*"):
        damage(path, "truncated")
    said = []
    go(config(out, "lora+dropout"), say=said.append)
    assert left(out) == left(finished) and sum("skipped" in line for line in said) == 9


def test_pruning_keeps_the_newest_good_ones_and_leftovers_go(tmp_path):
    out = tmp_path / "run"
    go(config(out, save_keep=2))
    root = out / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["step-00000008", "step-00000009"]
    damage(root / "step-00000009", "truncated")
    damage(root / "step-00000008", "no manifest")
    (root / ".tmp-00000007-1").mkdir()                 # left by a kill inside a save, and inside a pruning
    (root / ".tmp-old-step-00000007").mkdir()
    go(config(out, save_keep=2))
    assert sorted(p.name for p in root.iterdir()) == ["step-00000008", "step-00000009"]
    (root / ".tmp-00000007-1").mkdir()
    go(config(out, save_keep=2))                       # nothing to train, nothing to save
    assert sorted(p.name for p in root.iterdir()) == ["step-00000008", "step-00000009"]


def test_a_disk_that_refuses_a_save_leaves_the_run_resumable(tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    go(config(whole))
    from tsugiki.train import checkpoint
    plain, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 8:
            raise OSError(28, "No space left on device", str(path))
        plain(tensors, path)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        go(config(out))
    assert not list((out / "checkpoints").glob(".tmp-*")) and newest(out).name == "step-00000003"
    monkeypatch.undo()
    go(config(out))
    assert left(out) == left(whole)


def test_a_packed_run_and_a_resumed_packed_run_agree(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    said = []
    go(config(whole, "lora+dropout", layout="pack"), say=said.append)
    assert any("layout pack" in line for line in said)
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 5:
            shutil.rmtree(path)
    go(config(out, "lora+dropout", layout="pack"))
    assert left(out) == left(whole)


def test_twenty_runs_killed_at_random_moments_end_in_the_same_bits(tmp_path):
    """A fork server trains in children and kills them with SIGKILL, half of the kills aimed into saves."""
    script = Path(__file__).with_name("kill_server.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path), "20"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["identical"] == report["runs"] >= 20, report
    assert report["kills"] >= 40 and report["in_saves"] >= 8, report
    print(report)


def test_a_finished_run_that_was_killed_before_it_pruned_does_so_when_it_is_looked_at_again(tmp_path, monkeypatch):
    settings = config(tmp_path / "run", steps=4, save_steps=1, save_keep=2)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "prune", lambda root, keep: None)
        go(settings)
    kept = tmp_path / "run" / "checkpoints"
    assert len(list(kept.iterdir())) == 4
    go(settings)
    assert sorted(p.name for p in kept.iterdir()) == ["step-00000003", "step-00000004"]


def test_the_tests_model_is_the_same_each_time():
    a, b = llama().state_dict(), llama().state_dict()
    assert all((a[k] == b[k]).all() for k in a)

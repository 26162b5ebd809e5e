"""Training on text beside its source: shares, resumption, streaming and the forgetting guard, in whole runs."""
from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from kit import PAD, TOKENIZER, WORDS, config, cut, go, left, lines, llama, metrics, result_bits, same, write
from safetensors.torch import load_file
from tokenizers_tiny import tokenizer

import tsugiki as tg
from tsugiki.cli.main import parser
from tsugiki.cli.train import config_of
from tsugiki.config import RunConfig, build
from tsugiki.data import Renderer, load_conversations, stream
from tsugiki.data import tokens as on_disk
from tsugiki.data.batch import collate
from tsugiki.data.stream import Files
from tsugiki.errors import UserError
from tsugiki.methods import LoRA
from tsugiki.train.guard import told
from tsugiki.train.loss import token_losses
from tsugiki.train.rows import read_rows

SOURCE = [{"text": f"Once upon a time {w} and {v} sat on the mat, and it was {w}."} for w in WORDS for v in WORDS[:4]]
HELD = [{"text": f"There was {w} once, and {v} too."} for w in WORDS for v in WORDS[:2]]


def sources(out: Path, method="bitfit", data: dict | None = None, held: bool = False, **train) -> RunConfig:
    """A run on counting, with text replayed at a fifth of the tokens and its loss watched."""
    values = dataclasses.asdict(config(out, method, held=held))
    values["train"] |= train
    values["data"] |= {"replay": [str(write(out.parent / "source.jsonl", SOURCE))], "replay_ratio": 0.2,
                       "source_eval": [str(write(out.parent / "source-held.jsonl", HELD))]} | (data or {})
    return build(RunConfig, values)


def test_replay_gives_its_share_of_the_tokens_and_the_data_keeps_its_own_rows(tmp_path):
    plain = metrics(go(config(tmp_path / "plain" / "run")).out)
    found = metrics(go(sources(tmp_path / "mixed" / "run", "lora")).out)
    steps = [line for line in found if "loss" in line]
    longest = max(len(TOKENIZER(r["text"]).input_ids) + 1 for r in SOURCE)
    assert len(steps) == len(plain) == 9
    for line, alone in zip(steps, plain, strict=True):
        data, source = line["sources"]["data"], line["sources"]["source"]
        assert data["tokens"] == alone["tokens"] and data["tokens"] + source["tokens"] == line["tokens"]
        assert abs(source["tokens"] - data["tokens"] / 4) <= longest / 2
        assert data["supervised"] == alone["supervised"] and data["supervised"] + source["supervised"] == line["supervised"]
        total = sum(s["loss"] * s["supervised"] for s in (data, source) if s["supervised"])
        assert line["loss"] == pytest.approx(total / line["supervised"], rel=1e-6), "sum over tokens / their count"
    assert sum(line["sources"]["source"]["supervised"] > 0 for line in steps) >= 3
    assert steps[0]["sources"]["data"]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["lora+dropout", "full"])
def test_a_mixed_run_stopped_after_any_step_goes_on_to_the_same_bits(name, tmp_path):
    more = {"data": {"mix": {str(write(tmp_path / "chat.jsonl", lines(9, 50))): 0.1}}, "eval_steps": 3}
    whole = tmp_path / "whole"
    go(sources(whole, name, **more))
    want = left(whole)
    assert any("eval_sources" in line for line in want["metrics"])
    for k in (1, 4, 7):
        cut(whole, out := tmp_path / f"stopped-{k}", k)
        go(sources(out, name, **more))
        assert left(out) == want, f"stopped after step {k}"


def test_sources_of_any_shape_are_mixed_and_each_has_its_held_out_loss(tmp_path):
    chat = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": f"Say {w}"},
                                                         {"role": "assistant", "content": w}]} for w in WORDS * 2])
    alpaca = write(tmp_path / "alpaca.jsonl", [{"instruction": f"Name {w}.", "output": w} for w in WORDS])
    mix = {str(chat): 0.2, str(alpaca): 0.1}
    result = go(sources(tmp_path / "run", "bitfit", {"mix": mix, "source_holdout": 0.25}, held=True))
    line = [m for m in metrics(result.out) if "sources" in m][-1]
    assert list(line["sources"]) == ["data", "source", str(chat), str(alpaca)]
    assert all(s["tokens"] > 0 for s in line["sources"].values())
    after = result.plain()["sources"]
    assert after.keys() == {"source", str(chat), str(alpaca)} and after[str(chat)]["after"]["n"] == 6
    for score in after.values():
        assert score["after"]["perplexity"] == pytest.approx(math.exp(score["after"]["loss"]))
        assert score["after"]["loss"] != score["before"]["loss"]
    page = (result.out / "report.html").read_text()
    for said in ("Loss on source", f"Loss on {chat}", "perplexity on source", "held-out loss"):
        assert said in page, said


def test_the_source_loss_is_that_of_its_rows_one_at_a_time(tmp_path):
    model = llama(torch.float64)
    result = go(sources(tmp_path / "run", steps=2), model)
    examples, _ = Renderer(TOKENIZER).examples(load_conversations([tmp_path / "source-held.jsonl"]), 512)
    with torch.no_grad():
        losses = torch.cat([token_losses(model, collate([e], [[0]], PAD), adapter_ids="default")[0] for e in examples])
    score = result.plain()["sources"]["source"]["after"]
    assert score["n"] == len(HELD) and abs(score["loss"] - float(losses.mean())) < 1e-12


def test_looking_at_the_source_changes_no_bit_of_the_training(tmp_path):
    data = {"replay": [], "source_eval": []}
    want = result_bits(go(sources(tmp_path / "a" / "run", "lora+dropout", data)))
    cfg = sources(tmp_path / "b" / "run", "lora+dropout", {"replay": []}, eval_steps=1)
    assert same(result_bits(go(cfg)), want)
    none = sources(tmp_path / "c" / "run", "lora+dropout", {"replay_ratio": 0.0})
    assert same(result_bits(go(none)), want), "a share of nothing is no replay"
    assert not same(result_bits(go(sources(tmp_path / "d" / "run", "lora+dropout"))), want)


def test_other_source_rows_or_shares_are_another_run_and_a_moved_file_is_not(tmp_path):
    cfg = sources(tmp_path / "run", steps=2)
    go(cfg)
    moved = write(tmp_path / "elsewhere" / "s.jsonl", SOURCE)
    go(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, replay=[str(moved)])))
    with pytest.raises(UserError, match="holds another run .data.replay_ratio is 0.2 there, 0.3 here"):
        go(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, replay_ratio=0.3)))
    write(moved, SOURCE[1:])
    with pytest.raises(UserError, match="holds another run .the rows are others"):
        go(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, replay=[str(moved)])))


def test_a_run_made_before_a_key_existed_goes_on(tmp_path):
    cfg = config(tmp_path / "run", steps=2)
    go(cfg)
    path = tmp_path / "run" / "run.yaml"
    values = yaml.safe_load(path.read_text())
    for key in ("replay", "replay_ratio", "mix", "source_eval", "source_holdout", "streaming"):
        del values["data"][key]
    del values["train"]["forgetting"], values["train"]["forgetting_limit"]
    path.write_text(yaml.safe_dump(values))
    said = []
    go(cfg, say=said.append)
    assert any("this run is finished" in line for line in said)


# The guard.

STRANGE = [{"text": t} for t in ("日本語の文章です。", "猫が好きです。", "Ünïcödé çà et là", "12345 67890 日本", "好きな文章 là")]


def forgets(out: Path, replay=(), **train) -> RunConfig:
    """Counting at a rate that ruins the loss on text of other characters."""
    strange = str(write(out.parent / "strange.jsonl", STRANGE))
    data = {"replay": [strange for _ in replay], "replay_ratio": sum(replay), "source_eval": [strange]}
    return sources(out, "full", data, **{"lr": 2e-2, "steps": 12, "eval_steps": 2, "schedule": "constant"} | train)


def losses(result) -> dict[int, float]:
    return {m["step"]: m["eval_sources"]["source"]["loss"] for m in metrics(result.out) if "eval_sources" in m}


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory):
    return go(forgets(tmp_path_factory.mktemp("off") / "run", forgetting="off"))


def limit_between(found: dict[int, float], step: int) -> float:
    """A limit that is kept at `step` and passed two steps later."""
    return (found[step] + found[step + 2]) / 2 / found[0] - 1


def first_rise(found: dict[int, float]) -> int:
    """The first evaluated step, after some within, from which the source loss is above all before it."""
    steps = sorted(found)
    return next(a for a, b in zip(steps[1:], steps[2:], strict=False)
                if found[b] > max(found[s] for s in steps if s <= a) and found[b] > found[0])


def test_the_guard_stops_a_run_that_forgets_and_keeps_the_last_weights_within_the_limit(unguarded, tmp_path):
    found = losses(unguarded)
    step = first_rise(found)
    limit, said = limit_between(found, step), []
    whole = forgets(tmp_path / "whole", forgetting="stop", forgetting_limit=limit)
    result = go(whole, say=said.append)
    assert result.progress.step == step + 2 < 12 and "source loss is" in result.progress.stopped
    short = go(forgets(tmp_path / "short" / "run", forgetting="off", steps=12, save_steps=1))
    want = load_file(short.out / "checkpoints" / f"step-{step:08d}" / "params.safetensors")
    got = result_bits(result)
    assert all(torch.equal(got[n], want[n]) for n in want), "not the weights of the last evaluation within the limit"
    assert result.plain()["sources"]["source"]["after"]["loss"] == pytest.approx(found[step], rel=1e-6)
    line = told(result.plain()["sources"], whole.train)
    assert line.startswith("source loss ") and f"limit {limit:.1%}" in line and "stopped early" in (
        result.out / "report.html").read_text()
    want = left(tmp_path / "whole")
    for k in (1, step, step + 1, step + 2):
        cut(tmp_path / "whole", out := tmp_path / f"stopped-{k}", k)
        go(forgets(out, forgetting="stop", forgetting_limit=limit))
        assert left(out) == want, f"stopped after step {k}"


def test_a_guard_that_is_passed_at_the_first_look_gives_back_the_base(unguarded, tmp_path):
    found = losses(unguarded)
    over = next(s for s in sorted(found) if s and found[s] > found[0])
    model = llama()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    result = go(forgets(tmp_path / "run", forgetting="stop", forgetting_limit=0.0, eval_steps=over), model)
    assert result.progress.step == over and result.progress.best_step == 0
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_the_guard_warns_once_and_off_says_nothing(unguarded, tmp_path):
    for how, count in (("warn", 1), ("off", 0)):
        said = []
        result = go(forgets(tmp_path / how / "run", forgetting=how, forgetting_limit=0.0), say=said.append)
        assert sum("the source loss is" in line for line in said) == count and not result.progress.stopped
        assert same(result_bits(result), result_bits(unguarded)), "a warning changes nothing"
    assert sum(v > losses(unguarded)[0] for v in losses(unguarded).values()) > 1, "it could have warned twice"


def test_replay_keeps_the_source_loss_lower(unguarded, tmp_path):
    replayed = go(forgets(tmp_path / "run", replay=[0.5], forgetting="off"))
    assert losses(replayed)[12] < losses(unguarded)[0] < losses(unguarded)[12]


# Streaming.

def streamed(cfg: RunConfig, how: str) -> RunConfig:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, streaming=how))


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_tokens_on_disk_train_the_same_bits_as_in_memory_and_resume_exactly(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 90)
    text = "\n".join(f"{r['text']}\n  It was so.\n" for r in SOURCE)
    (tmp_path / "corpus.txt").write_text(text)
    file = {".txt": str(tmp_path / "corpus.txt"), ".jsonl": str(write(tmp_path / "corpus.jsonl", SOURCE))}[suffix]
    data = {"files": [file], "replay": [str(write(tmp_path / "rows.jsonl", lines(12)))]}

    def cfg(out: Path, how: str) -> RunConfig:
        return streamed(sources(out, "lora+dropout", data, max_length=24), how)
    want = go(cfg(tmp_path / "memory", "off"))
    got = go(cfg(tmp_path / "disk", "on"))
    assert same(result_bits(got), result_bits(want)) and metrics(got.out) == metrics(want.out)
    assert (got.out / "tokens" / "MANIFEST.json").exists()
    made = (got.out / "tokens" / "ids.u32").stat().st_mtime_ns
    cut(got.out, out := tmp_path / "stopped", 4)
    go(cfg(out, "on"))
    assert left(out) == left(got.out) and (got.out / "tokens" / "ids.u32").stat().st_mtime_ns == made
    (out / "tokens" / "ids.u32").write_bytes(b"1234")  # damaged: made again
    cut(out, again := tmp_path / "again", 6)
    go(cfg(again, "on"))
    assert left(again) == left(got.out)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("size", [2, 3, 17, 64, 10_000])
def test_a_text_read_in_pieces_has_the_rows_of_the_whole(kind, size, tmp_path, monkeypatch):
    renderer = Renderer(tokenizer(kind, "<s>", "</s>", adds_bos=True))
    text = "\n\nThe cat sat.\r\n  It sat there. 日本\n\n\n\"So!\" 12\nla la: la\n\tEnd" * 9
    file = tmp_path / "t.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    want, report = renderer.examples(load_conversations([file]), size)
    for piece in (1, 40, 200, 1 << 20):
        monkeypatch.setattr(stream, "PIECE", piece)
        counts = Counter()
        assert list(Files((str(file),)).examples(renderer, size, counts)) == want, piece
        assert counts["rows"] == report.rows and counts["chunks"] == report.chunks
        assert (len(list(Files((str(file),)))) > 1) == (piece < 1000)


@pytest.mark.parametrize("name, content, said", [
    ("a.txt", b"fine\nbad \xff\n", "a.txt:2: row: not UTF-8"), ("b.txt", b" \n\n", "b.txt:1: file: is empty"),
    ("c.txt", b"fine\n</s>\n", "c.txt:1: text: holds the special token"), ("d.txt", None, "d.txt: no such file"),
    ("e.jsonl", b'{"text": "a"}\n{"text": 3}\n', "e.jsonl:2: text: is a number"),
    ("f.txt.gz", b"\x1f\x8b\x08broken", "f.txt.gz:1: file: damaged")])
def test_bad_data_is_named_by_line_when_streamed_too(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        files = Files((str(tmp_path / name),))
        list(files)
        list(files.examples(Renderer(TOKENIZER), 32, Counter()))


def test_rows_on_disk_are_the_rows_that_were_written_and_a_full_disk_leaves_nothing(tmp_path):
    examples, _ = Renderer(TOKENIZER).examples(load_conversations([write(tmp_path / "r.jsonl", [*SOURCE, *HELD])]), 20)
    there = on_disk.write(tmp_path / "tokens", "key", iter(examples), {"a": 1})
    assert list(there) == examples and there[-1] == examples[-1] and there[3:5] == examples[3:5]
    assert there.lengths.tolist() == [len(e.ids) for e in examples]
    assert on_disk.found(tmp_path / "tokens", "other") is None and on_disk.found(tmp_path / "none", "key") is None

    def fails():
        yield examples[0]
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        on_disk.write(tmp_path / "more", "key", fails(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl", "tokens"]


GROWTH = """
import sys
from collections import Counter
from pathlib import Path
sys.path[:0] = {paths}
from kit import TOKENIZER
from tsugiki.data import Renderer
from tsugiki.data import tokens
from tsugiki.data.mixture import Mixture
from tsugiki.data.stream import Files

def peak():
    return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))) / 1024

found = []
for name in {files}:
    files = Files((name,))
    sum(len(c.reference) for c in files)
    rows = tokens.write(Path(name + ".tokens"), "k", files.examples(Renderer(TOKENIZER), 512, Counter()), {{}})
    mixture = Mixture.alone(len(rows), 16, 0)
    seen = sum(len(rows[i].ids) for step in range(mixture.pace) for i in mixture.rows(step))
    assert seen == int(rows.lengths.sum())
    found.append(peak())
print(*found)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Reading, tokenising and a pass over the rows, of a file and of one four times as large, in one process. In memory the rows
    take about ten bytes a byte of text."""
    block = "".join(f"{r['text']} It went on and on.\n" for r in (*SOURCE, *HELD)) * 40
    names = []
    for size in (1, 4):
        names.append(str(tmp_path / f"{size}.txt"))
        Path(names[-1]).write_text(block * (8 * size))
    paths = [str(Path(__file__).parent), str(Path(tg.__file__).parents[1])]
    code = GROWTH.format(paths=paths, files=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    small, large = map(float, done.stdout.split())
    megabytes = (Path(names[1]).stat().st_size - Path(names[0]).stat().st_size) / 1e6
    assert megabytes > 4 and large - small < 2.5 * megabytes, (small, large, megabytes)


# What is asked for.

def refused(**values) -> str:
    with pytest.raises(UserError) as e:
        build(RunConfig, values)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_the_keys_ask_of_one_another_is_told_in_a_line():
    assert "a.jsonl': 1.5 is out of range" in refused(data={"mix": {"a.jsonl": 1.5}})
    assert "sum to 1" in refused(data={"mix": {"a.jsonl": 0.9}, "replay": ["b"], "replay_ratio": 0.1})
    assert "data.mix: expected float" in refused(data={"mix": {"a.jsonl": "much"}})
    assert "give one of them, or data.source_eval" in refused(data={"source_holdout": 0.1})
    assert "not with data.streaming on" in refused(data={"streaming": True, "holdout": 0.1})
    assert "stop needs held-out source text" in refused(train={"forgetting": "stop", "eval_steps": 5}, data={"holdout": 0.1})
    assert "train.eval_steps" in refused(train={"forgetting": "stop"}, data={"source_eval": ["a"]})
    assert build(RunConfig, {"train": {"forgetting": False}}).train.forgetting == "off"
    assert build(RunConfig, {"train": {"eval_steps": 5}, "data": {"source_eval": ["a"]}}).train.eval_steps == 5


def test_the_flags_are_the_keys():
    words = ("train --data a.txt --replay b.txt c.txt --replay-ratio 0.05 --mix d.jsonl=0.2 e=f.jsonl=0.1 --source-eval g.txt "
             "--forgetting stop --forgetting-limit 0.02 --eval-steps 5 --streaming on --out o").split()
    cfg = config_of(parser().parse_args(words))
    assert cfg.data.replay == ["b.txt", "c.txt"] and cfg.data.replay_ratio == 0.05 and cfg.data.source_eval == ["g.txt"]
    assert cfg.data.mix == {"d.jsonl": 0.2, "e=f.jsonl": 0.1} and cfg.data.streaming == "on"
    assert cfg.train.forgetting == "stop" and cfg.train.forgetting_limit == 0.02
    with pytest.raises(UserError, match="expected FILE=SHARE"):
        config_of(parser().parse_args([*words[:3], "--mix", "a.jsonl", "--out", "o"]))


def test_the_library_takes_the_same_keys(tmp_path):
    rows, source = write(tmp_path / "rows.jsonl", lines(8)), write(tmp_path / "s.jsonl", SOURCE)
    held = write(tmp_path / "h.jsonl", HELD)
    result = tg.train(llama(), TOKENIZER, rows, tmp_path / "run", method=LoRA(rank=2), quiet=True, steps=2, dtype="fp32",
                      replay=[source], replay_ratio=0.3, source_eval=[held], forgetting="off")
    values = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert values["data"]["replay_ratio"] == 0.3 and result.plain()["sources"]["source"]["after"]["n"] == len(HELD)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["sources"]["source"]["tokens"] > 0


def test_large_files_are_streamed_by_their_size_alone(tmp_path, monkeypatch):
    from tsugiki.train import sources as module
    monkeypatch.setattr(module, "LARGE", 100)
    cfg = config(tmp_path / "run")
    assert isinstance(read_rows(cfg, lambda line: None).train, Files)
    assert not isinstance(read_rows(streamed(cfg, "off"), lambda line: None).train, Files)
    held = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, holdout=0.2))
    assert not isinstance(read_rows(held, lambda line: None).train, Files)


def test_no_step_is_trained_differently_by_how_it_is_cut(tmp_path):
    """Replay rows are rows as others: smaller forwards give the same update."""
    a = go(sources(tmp_path / "a" / "run", "lora", steps=4, max_tokens=4096, max_length=40, layout="pad"), llama(torch.float64))
    b = go(sources(tmp_path / "b" / "run", "lora", steps=4, max_tokens=40, max_length=40, layout="pad"), llama(torch.float64))
    assert [m["loss"] for m in metrics(a.out) if "loss" in m] == pytest.approx(
        [m["loss"] for m in metrics(b.out) if "loss" in m], rel=1e-9)

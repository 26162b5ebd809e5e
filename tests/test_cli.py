"""The command line: what goes wrong is told in at most three lines with the right exit code; what goes well is printed once."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kit import CASES, TOKENIZER, left, lines, llama, metrics, write
from safetensors.torch import load_file
from test_bad_data import CASES as BAD_DATA
from tokenizers_tiny import CHATML
from transformers import AutoModelForCausalLM

from tsugiki.cli.main import main
from tsugiki.formats.export import export_model
from tsugiki.load import base_path

COMMANDS = ("demo", "train", "compare", "generate", "chat", "eval", "merge", "combine", "convert", "methods", "plan", "data",
            "serve")
SOURCE = str(Path(__file__).parents[1] / "src")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama and its tokenizer as a transformers folder."""
    return str(export_model(llama(), TOKENIZER, tmp_path_factory.mktemp("base") / "base", dtype=torch.float32))


@pytest.fixture(scope="module")
def broken(base, tmp_path_factory):
    """The same, with weights that cannot be loaded: whoever gets that far says so."""
    folder = tmp_path_factory.mktemp("broken") / "base"
    folder.mkdir()
    for path in Path(base).iterdir():
        data = path.read_bytes()
        (folder / path.name).write_bytes(data if path.suffix != ".safetensors" else data[:100])
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("rows") / "rows.jsonl", lines(16)))


@pytest.fixture
def call(capsys):
    """Run a command: (exit code, stdout, stderr)."""
    def run(*argv):
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err
    return run


def train(base, rows, out, *more):
    return ("train", "--base", base, "--data", rows, "--out", out, "--dtype", "fp32", "--batch-size", "4", "--steps", "4",
            "--lr", "0.01", "--set", "eval.max_new_tokens=4", *more)


@pytest.fixture(scope="module")
def adapter(base, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main([str(a) for a in train(base, rows, out, "--quiet", "--set", "method.rank=4")]) == 0
    return str(out / "adapter")


# What goes wrong

def bad_input(code, out, err, *parts):
    assert code == 2, (code, err)
    said = err.splitlines()
    assert out == "" and 1 <= len(said) <= 3 and all(line.strip() for line in said), err
    assert said[0].startswith("error: ") or "rows to train on" in said[0] and said[1].startswith("error: "), err
    assert all(str(p) in err for p in parts), err


@pytest.mark.parametrize("name", [n for n in BAD_DATA if n != "huge line"])
def test_bad_data_is_told_by_file_and_line_before_the_model_is_loaded(name, call, broken, tmp_path):
    file, content, expected, *columns = BAD_DATA[name]
    content = content() if callable(content) else content
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    table = ["--prompt", columns[0].prompt, "--completion", columns[0].completion] if columns else []
    table += ["--labels", ",".join(f"{k}={v}" for k, v in columns[0].labels.items())] if columns else []
    bad_input(*call("train", "--base", broken, "--data", path, "--out", tmp_path / "run", *table), path, expected)
    bad_input(*call("eval", "--base", broken, "--data", path, *table), path, expected)
    assert not (tmp_path / "run").exists()
    code, out, _ = call("data", "check", path, "--json", *table)
    assert code == 2 and any(expected in p for p in json.loads(out)["problems"])


def test_there_are_enough_kinds_of_bad_data():
    assert len(BAD_DATA) >= 60


def test_good_data_gets_as_far_as_the_broken_weights(call, broken, rows, tmp_path):
    bad_input(*call(*train(broken, rows, tmp_path / "run")), "cannot be loaded")
    bad_input(*call("eval", "--base", broken, "--data", rows), "cannot be loaded")
    assert not (tmp_path / "run").exists()


# name: (flags after train --base broken --data rows --out run, what is said)
WRONG = {
    "unknown flag": (["--epoch", "3"], "unknown flag --epoch; did you mean '--epochs'?"),
    "flag cut short": (["--batch", "3"], "unknown flag --batch"),
    "flag without value": (["--lr"], "argument --lr: expected one argument"),
    "unknown key": (["--set", "train.learning_rate=1"], "train.learning_rate: unknown key"),
    "unknown section": (["--set", "trian.lr=1"], "trian: unknown key; did you mean 'train'?"),
    "set without value": (["--set", "train.lr"], "--set train.lr: expected KEY=VALUE"),
    "text for a number": (["--lr", "fast"], "train.lr: expected float, found 'fast'"),
    "a negative rate": (["--lr", "-1"], "train.lr: -1 is out of range, allowed: at least 0"),
    "nan": (["--lr", "nan"], "train.lr: expected float, found 'nan'"),
    "half a step": (["--steps", "2.5"], "train.steps: expected int, found '2.5'"),
    "true for a number": (["--set", "train.steps=true"], "train.steps: expected int, found True"),
    "no step": (["--steps", "0"], "train.steps: 0 is out of range, allowed: at least 1"),
    "no epoch": (["--epochs", "0"], "train.epochs: 0 is out of range"),
    "beta2 of 1": (["--set", "train.beta2=1"], "train.beta2: 1 is out of range"),
    "no batch": (["--batch-size", "0"], "train.batch_size: 0 is out of range"),
    "unknown schedule": (["--set", "train.schedule=cosin"], "did you mean 'cosine'?"),
    "unknown format": (["--format", "alpca"], "did you mean 'alpaca'?"),
    "unknown dtype": (["--dtype", "fp8"], "train.dtype: 'fp8' is not one of auto, bf16, fp32"),
    "unknown metric": (["--metric", "rouge"], "eval.metric: 'rouge' is not one of"),
    "unknown method": (["--method", "lorra"], "no method is called 'lorra'; did you mean 'lora'?"),
    "unknown method field": (["--set", "method.rnk=3"], "method.rnk: lora has no such setting; did you mean 'rank'?"),
    "field of another method": (["--method", "bitfit", "--set", "method.rank=3"], "method.rank: bitfit has no such setting"),
    "method of a list": (["--set", "method.name=[lora]"], "method.name: expected the name of a method"),
    "rank of 0": (["--set", "method.rank=0"], "lora: rank must be at least 1"),
    "rank of text": (["--set", "method.rank=big"], "lora: rank must be a whole number, got 'big'"),
    "dropout of 1": (["--set", "method.dropout=1"], "lora: dropout must be below 1"),
    "broken regex": (["--method", "full", "--set", "method.params=(("], "is not a regular expression"),
    "unknown device": (["--device", "tpu9"], "device: 'tpu9' is not a device"),
    "the meta device": (["--device", "meta"], "device: 'meta' is not a device"),
    "no gpu here": (["--device", "cuda:77"], "device: "),
    "missing yaml": (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    "prompt without completion": (["--prompt", "{a}"], "data.completion: missing"),
    "labels without templates": (["--labels", "0=a,1=b"], "data.labels"),
    "labels without words": (["--labels", "0,1"], "--labels 0,1: expected VALUE=WORD"),
    "broken template": (["--prompt", "{a", "--completion", "x"], "broken template"),
    "best without held-out rows": (["--set", "train.keep=best"], "train.keep: best needs held-out rows"),
    "evaluations without held-out rows": (["--eval-steps", "5"], "train.eval_steps needs held-out rows"),
    "patience without evaluations": (["--holdout", "0.2", "--set", "train.patience=2"], "train.patience: counts evaluations"),
    "all rows held out": (["--holdout", "1"], "data.holdout: 1 is out of range, allowed: 0 to 0.9"),
    "missing held-out file": (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "missing template": (["--set", "data.template=nowhere.jinja"], "data.template: nowhere.jinja: No such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_told_before_the_model_is_loaded(name, call, broken, rows, tmp_path):
    flags, expected = WRONG[name]
    bad_input(*call("train", "--base", broken, "--data", rows, "--out", tmp_path / "run", *flags), expected)
    assert not (tmp_path / "run").exists()


ELSEWHERE = {
    "no command": ([], "required: COMMAND"),
    "misspelt command": (["trian"], "trian"),
    "no data": (["train", "--out", "x"], "data.files: no training data"),
    "no out": (["train", "--data", "ROWS"], "out: missing"),
    "base that is no folder": (["train", "--data", "ROWS", "--out", "x/y", "--base", "./nowhere"], "base: no folder ./nowhere"),
    "base that is a file": (["train", "--data", "ROWS", "--out", "x/y", "--base", "ROWS"], "is a file; give the folder"),
    "base without config": (["eval", "--data", "ROWS", "--base", "EMPTY"], "has no config.json"),
    "eval dtype": (["eval", "--base", "BASE", "--data", "ROWS", "--dtype", "fp8"], "dtype: 'fp8' is not one of auto, bf16"),
    "generate dtype": (["generate", "--base", "BASE", "--prompt", "a", "--dtype", "half"], "dtype: 'half'"),
    "eval metric": (["eval", "--base", "BASE", "--data", "ROWS", "--metric", "f1"], "eval.metric: 'f1'"),
    "adapter folder": (["eval", "--base", "BASE", "--data", "ROWS", "--adapter", "EMPTY"], "no adapter_config.json there"),
    "adapter that is a model": (["eval", "--base", "BASE", "--data", "ROWS", "--adapter", "BASE"], "give it as --base"),
    "two adapters": (["eval", "--base", "BASE", "--data", "ROWS", "--adapter", "ADAPTER", "--adapter", "b=ADAPTER"],
                     "one --adapter"),
    "no adapter to merge": (["merge", "--base", "BASE", "--out", "x/y"], "--adapter: missing"),
    "merge dtype": (["merge", "--base", "BASE", "--adapter", "ADAPTER", "--out", "x/y", "--dtype", "int8"],
                    "--dtype int8: allowed"),
    "merge limit": (["merge", "--base", "BASE", "--adapter", "ADAPTER", "--out", "x/y", "--limit", "-1"], "--limit -1.0"),
    "merge into a full folder": (["merge", "--base", "BASE", "--adapter", "ADAPTER", "--out", "BASE"], "is there already"),
    "matrix": (["plan", "--matrix", "300"], "expected DxK"),
    "empty matrix": (["plan", "--matrix", "0x5"], "must be at least 1"),
    "matrix of another method": (["plan", "--matrix", "3x5", "--method", "full"], "counts LoRA, not full"),
    "plan of a training key": (["plan", "--base", "BASE", "--set", "train.lr=1"], "--set train: plan takes fields of the method"),
    "plan of method as text": (["plan", "--base", "BASE", "--set", "method=5"], "--set method"),
    "plan without tokens": (["plan", "--base", "BASE", "--tokens", "0"], "--tokens 0"),
    "plan dtype": (["plan", "--base", "BASE", "--dtype", "fp8"], "dtype: 'fp8'"),
    "show no rows": (["data", "show", "ROWS", "--base", "BASE", "--rows", "0"], "--rows 0"),
    "no answer length": (["generate", "--base", "BASE", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    "negative temperature": (["generate", "--base", "BASE", "--prompt", "a", "--temperature", "-1"],
                             "--temperature must be 0 or more"),
    "a prompt too long": (["generate", "--base", "BASE", "--prompt", "so " * 900], "the model takes 256"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_wrong_flags_of_the_other_commands_are_told(name, call, base, rows, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    flags, expected = ELSEWHERE[name]
    known = {"ROWS": rows, "BASE": base, "EMPTY": str(tmp_path / "empty"), "ADAPTER": adapter}
    bad_input(*call(*(known.get(f, f.replace("ADAPTER", adapter)) for f in flags)), expected)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty"]


# What goes well

def one_object(code, out, err):
    assert code == 0, err
    assert out.count("\n") == 1 and out.endswith("}\n")
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_is_one_object_on_stdout_for_every_command(call, base, rows, tmp_path):
    out = tmp_path / "run"
    made = one_object(*call(*train(base, rows, out, "--holdout", "0.25", "--json")))
    assert made["steps"] == 4 and made["saved"] == str(out / "adapter") and Path(made["report"]).is_file()
    assert {"loss", "n", "metric"} <= made["before"].keys() and made["after"]["loss"] < made["before"]["loss"]
    scored = one_object(*call("eval", "--base", base, "--adapter", out / "adapter", "--data", rows, "--metric", "exact",
                              "--max-new-tokens", "4", "--json"))
    assert {"accuracy", "n", "interval", "loss"} <= scored.keys() and scored["n"] == 16
    said = one_object(*call("generate", "--base", base, "--adapter", out / "adapter", "--prompt", "one and", "--prompt", "two",
                            "--max-new-tokens", "3", "--json"))
    assert [a["prompt"] for a in said["answers"]] == ["one and", "two"]
    merged = one_object(*call("merge", "--base", base, "--adapter", out / "adapter", "--out", tmp_path / "m", "--json"))
    assert merged["relative_error"] < 0.01 and (tmp_path / "m" / "config.json").is_file()
    planned = one_object(*call("plan", "--base", base, "--json"))
    assert {p["method"] for p in planned["plans"]} == {c.name for c in CASES.values()}
    assert one_object(*call("plan", "--matrix", "300x300", "--json"))["lora"] == 4800
    checked = one_object(*call("data", "check", rows, "--base", base, "--json"))
    assert checked["rows"] == 16 and checked["problems"] == []
    shown = one_object(*call("data", "show", rows, "--base", base, "--rows", "2", "--json"))
    assert [r["where"] for r in shown["rows"]] == [f"{rows}:1", f"{rows}:2"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_0_and_shows_the_flags_and_an_example(command, call):
    code, out, err = call(command, "--help")
    assert code == 0 and err == "" and len(out.splitlines()) > 8 and "--json" in out
    assert command in ("demo", "chat") or f"tsugiki {command} " in out.replace("usage: ", "")
    assert call("--help")[0] == 0 and command in call("--help")[1]


def test_every_command_is_tested():
    from tsugiki.cli.main import parser
    assert set(parser()._subparsers._group_actions[0].choices) == set(COMMANDS)


def test_the_classic_example_of_the_plan(call):
    code, out, _ = call("plan", "--matrix", "300x300", "--set", "method.rank=2")
    assert code == 0 and "90,000" in out and "1,200" in out


@pytest.mark.share(2)
@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_scores_and_answers_from_the_command_line(name, call, base, rows, tmp_path):
    cfg = CASES[name]
    from tsugiki.formats.native import settings
    fields = [f"--set=method.{k}={json.dumps(v)}" for k, v in settings(cfg).items() if v is not None]
    code, out, err = call(*train(base, rows, tmp_path / "run", "--method", cfg.name, "--eval-data", rows, *fields))
    assert code == 0 and "before" in out and "report" in out, err
    made = tmp_path / "run" / ("model" if not cfg.parts else "adapter")
    where = ["--base", made] if not cfg.parts else ["--base", base, "--adapter", made]
    scored = one_object(*call("eval", *where, "--data", rows, "--max-new-tokens", "4", "--json", "--dtype", "fp32"))
    logged = metrics(tmp_path / "run")[-1]["eval"]
    assert scored["n"] == 16 and scored["loss"] == pytest.approx(logged["loss"], rel=1e-5), "the folder is not what was trained"
    assert call("generate", *where, "--prompt", "one and 0 is", "--max-new-tokens", "3")[0] == 0


def test_a_finished_run_says_so_and_another_configuration_is_refused(call, base, rows, tmp_path):
    command = train(base, rows, tmp_path / "run")
    assert call(*command)[0] == 0
    want = left(tmp_path / "run")
    code, out, err = call(*command, "--save-steps", "3")
    assert code == 0 and "finished" in err and left(tmp_path / "run") == want
    bad_input(*call(*command, "--seed", "5"), "holds another run (train.seed is 0 there, 5 here)")
    assert left(tmp_path / "run") == want


def test_an_adapter_in_a_folder_with_an_equals_sign(call, base, adapter, rows, tmp_path):
    folder = tmp_path / "lr=0.01"
    folder.mkdir()
    for path in Path(adapter).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert call("eval", "--base", base, "--adapter", folder, "--data", rows, "--metric", "loss")[0] == 0
    assert call("eval", "--base", base, "--adapter", f"mine={folder}", "--data", rows, "--metric", "loss")[0] == 0


def test_a_merged_folder_is_plain_transformers_and_keeps_the_chat_template_it_was_trained_with(call, base, tmp_path):
    chat = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": r["prompt"]},
                                                         {"role": "assistant", "content": r["completion"]}]} for r in lines(8)])
    (tmp_path / "chatml.jinja").write_text(CHATML)
    code, _, err = call(*train(base, chat, tmp_path / "run", "--set", f"data.template={tmp_path / 'chatml.jinja'}"))
    assert code == 0, err
    assert call("merge", "--base", base, "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "m")[0] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    live = one_object(*call("eval", "--base", base, "--adapter", tmp_path / "run" / "adapter", "--data", chat, "--metric", "loss",
                            "--json", "--dtype", "fp32"))
    merged = one_object(*call("eval", "--base", tmp_path / "m", "--data", chat, "--metric", "loss", "--json", "--dtype", "fp32"))
    assert merged["loss"] == pytest.approx(live["loss"], abs=1e-4)


def test_chat_talks_and_switches_and_survives_mistakes(call, base, adapter, monkeypatch, tmp_path):
    typed = iter(["/help", "", "one and", "/adapter nobody", "/adapter none", "two and", "/adapter mine", "/system be brief",
                  "/reset", "/what", "so " * 900, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    code, out, _ = call("chat", "--base", base, "--adapter", f"mine={adapter}", "--max-new-tokens", "3")
    assert code == 0 and "adapters: mine; now mine" in out and "no adapter 'nobody'" in out and "now the base alone" in out
    assert "error: the prompt has" in out
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    assert call("chat", "--base", base)[0] == 0


def test_without_an_embedded_base_the_demo_says_so(call, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["tsugiki.load"], "files", lambda package: tmp_path)
    bad_input(*call("plan"), "has no embedded base")


def test_the_base_may_be_a_folder_with_a_tilde(base, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(base).parent))
    assert base_path("~/base") == base


# As processes

def process(*argv, **more):
    return subprocess.Popen([sys.executable, "-m", "tsugiki.cli.main", *map(str, argv)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": SOURCE}, **more)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_saves_and_exits_with_128_and_its_number(signum, call, base, rows, tmp_path):
    """Stopped somewhere in the middle, then finished in this process: the bits are those of a run never stopped."""
    command = train(base, rows, tmp_path / "run")
    at = command.index("--steps")
    command = [*command[:at], "--steps", "1500", *command[at + 2:], "--set", "train.log_steps=1"]
    running = process(*command)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.02)
    running.send_signal(signum)
    out, err = running.communicate(timeout=600)
    assert running.returncode == 128 + signum, err
    assert "Traceback" not in err and "saved; the same command goes on from here" in err.splitlines()[-1] and out == ""
    stopped = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    at = int(stopped.name[5:])
    assert 3 <= at < 1500 and not (tmp_path / "run" / "adapter").exists()
    assert all(torch.isfinite(t).all() for t in load_file(stopped / "params.safetensors").values())
    assert len(log.read_text().splitlines()) == at


def test_as_a_process_bad_input_is_2_and_a_failed_run_1(base, tmp_path):
    """A base with a weight that is not a number: the run stops at step 1 with one line and exit code 1."""
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    export_model(model, TOKENIZER, tmp_path / "sick", dtype=torch.float32)
    rows = write(tmp_path / "rows.jsonl", lines(8))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    runs = [process(*train(tmp_path / "sick", rows, tmp_path / "run")),
            process("train", "--base", base, "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "other")]
    said = [p.communicate(timeout=600) for p in runs]
    assert [p.returncode for p in runs] == [1, 2]
    assert [out for out, _ in said] == ["", ""] and all("Traceback" not in err for _, err in said)
    last = said[0][1].splitlines()[-1]
    assert last.startswith("stopped: step 1: the loss is not finite in") and f"{rows}:" in last
    assert len(said[1][1].splitlines()) <= 3 and f"{tmp_path / 'bad.jsonl'}:1:" in said[1][1]


def test_long_commands_start_over_with_tcmalloc_once_where_it_is_installed(monkeypatch):
    from tsugiki.cli import main as cli
    calls = []
    monkeypatch.setattr(cli.os, "execv", lambda *a: calls.append(a))
    monkeypatch.setattr(cli, "find_library", lambda name: "libtcmalloc_minimal.so.4" if name == "tcmalloc_minimal" else None)
    monkeypatch.setattr(cli.sys, "platform", "linux")

    def start(command, **env):
        monkeypatch.setattr(cli.sys, "argv", ["tsugiki", command, "--data", "x"])
        for name in ("LD_PRELOAD", "TSUGIKI_ALLOCATOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        cli._with_tcmalloc()
    start("train")
    assert calls.pop() == (sys.executable, [sys.executable, "-m", "tsugiki.cli.main", "train", "--data", "x"])
    assert cli.os.environ["LD_PRELOAD"] == "libtcmalloc_minimal.so.4"
    start("methods")                                  # too short to matter
    start("train", LD_PRELOAD="other.so")             # somebody chose already, or this is the second start
    start("train", TSUGIKI_ALLOCATOR="system")
    monkeypatch.setattr(cli, "find_library", lambda name: None)
    start("train")
    assert not calls

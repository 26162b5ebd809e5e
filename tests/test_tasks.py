"""Tasks: rows become prompts to the byte, scores equal a plain re-computation row by row, whatever the batch or the padding."""
import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from kit import ADAPTERS, PAD, TOKENIZER, llama
from tiny import fill
from tokenizers_tiny import data_dir, styled
from torch.nn import functional as F

from tsugiki.adapters import attach
from tsugiki.config import EvalConfig
from tsugiki.data import Renderer
from tsugiki.data.batch import collate
from tsugiki.errors import UserError
from tsugiki.evaluate import tasks
from tsugiki.evaluate.answers import room
from tsugiki.evaluate.metrics import LOWER, Scoring, right
from tsugiki.evaluate.score import row_losses, wilson

F64 = torch.float64
ROWS = [{"instruction": f"Is {a} plus {b} {a + b + (a + b) % 2}?\n\nAnswer format: true/false", "input": "",
         "output": f"the correct answer is {'false' if (a + b) % 2 else 'true'}", "answer": "false" if (a + b) % 2 else "true"}
        for a, b in zip(range(12), range(3, 15), strict=True)] + [
        {"instruction": "Is it?\n\nAnswer format: true/false/maybe", "input": "", "output": "", "answer": "maybe"}]
SUMS = [{"instruction": f"What is {a} and 3?", "input": "", "output": "", "answer": f"{a + 3}.0"} for a in range(8)]


@pytest.fixture(scope="module")
def plain():
    """The plain functions of scripts/check_tasks.py, which share no code with the package."""
    spec = importlib.util.spec_from_file_location("check_tasks", Path(__file__).parents[1] / "scripts" / "check_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(folder: Path, rows: list[dict], spec: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.json").write_text(json.dumps(rows, indent=1))
    if spec:
        (folder / "task.yaml").write_text(spec)
    return folder


def model_of(seed: int = 1, **more):
    """A tiny Llama with an adapter that makes it say different things."""
    model = llama(F64, max_position_embeddings=1024, **more)
    fill(attach(model).add("a", ADAPTERS["lora"]), seed=seed, scale=0.3)
    return model


def score(model, task, tokenizer=TOKENIZER, limit=None, **cfg):
    cfg = EvalConfig(**{"max_new_tokens": 8} | cfg)
    return tasks.score(model, Renderer(tokenizer), task, cfg, PAD, limit or room(model) or 512)


# Rows to prompts

def test_the_prompt_is_the_papers_to_the_byte(tmp_path, plain):
    task = tasks.load("boolq", put(tmp_path, ROWS))
    assert [i.conversation.prompt_text for i in task.items] == [plain.paper_prompt(r["instruction"]) for r in ROWS]
    assert task.items[0].options == (("true", "the correct answer is true"), ("false", "the correct answer is false"))
    assert [c for c, _ in task.items[-1].options] == ["true", "false", "maybe"] and task.items[-1].gold == "maybe"
    assert task.items[-1].conversation.reference == "the correct answer is maybe", "no output of its own: said as the others say it"
    with_input = tasks.load("AddSub", put(tmp_path / "in", [SUMS[0] | {"input": "Count."}])).items[0].conversation.prompt_text
    assert "paired with an input" in with_input and f"### Input:\n{' ' * 16}Count.\n\n" in with_input


def test_a_chat_model_is_asked_the_bare_instruction(tmp_path):
    task = tasks.load("boolq", put(tmp_path, ROWS), chat=True)
    assert task.items[0].conversation.kind == "chat" and task.items[0].conversation.prompt_text == ROWS[0]["instruction"]


REAL = {"boolq": 3270, "winogrande": 1267, "ARC-Easy": 2376, "ARC-Challenge": 1172, "openbookqa": 500, "mathqa": 2985,
        "gsm8k": 1319, "mawps": 238, "AddSub": 395, "MultiArith": 600, "SingleEq": 508}


@pytest.mark.parametrize("name", REAL)
def test_the_real_files_of_the_paper_are_read_whole(name):
    task = tasks.load(name, data_dir("llm-adapters", "dataset"))
    assert len(task.items) == REAL[name] and all(i.gold for i in task.items)
    metric = task.spec.metric
    assert all(len(i.options) > 1 and i.gold in dict(i.options) for i in task.items) if metric == "choice" else metric == "number"


def test_the_other_real_files_are_read_whole():
    for folder, name, n in (("gsm8k", "gsm8k", 1319), ("glue", "sst2", 872), ("e2e/original", "e2e", 4693),
                            ("e2e/lora-paper", "e2e", 4693)):
        assert len(tasks.load(name, data_dir(*folder.split("/"))).items) == n
    assert len(tasks.load("perplexity", data_dir("tinystories-sample")).items) >= 1
    solved = tasks.load("gsm8k", data_dir("gsm8k"), 3).items[0]
    assert solved.gold.endswith("#### 18") and solved.conversation.reference == solved.gold
    assert {"boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa", "MultiArith",
            "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP"} <= set(tasks.builtin()), "the fourteen of the paper"


def test_a_folder_with_a_test_json_is_a_task(tmp_path):
    assert tasks.load(put(tmp_path / "mine", ROWS[:6])).spec.metric == "choice"
    assert tasks.load(put(tmp_path / "sums", SUMS)).spec.metric == "number"
    words = [{"instruction": f"Say word {i}.", "answer": f"word {'abc'[i % 3]}"} for i in range(9)]
    few = tasks.load(put(tmp_path / "words", words))
    assert few.spec.metric == "choice" and [c for c, _ in few.items[0].options] == ["word a", "word b", "word c"]
    many = tasks.load(put(tmp_path / "many", [w | {"answer": f"word {'abcdefghi'[i]}"} for i, w in enumerate(words)]))
    assert many.spec.metric == "exact" and many.name == "many" and many.items[0].conversation.reference == "word a"
    assert tasks.load(put(tmp_path / "ARC-Easy", ROWS[:2])).spec.source, "a folder of a known name is that task"
    own = tasks.load(put(tmp_path / "own", [{"q": "Say so.", "a": "so"}], "like: gsm8k\nmetric: contains\nprompt: \"Q: {q}\\nA:\"\n"
                         "message: '{q}'\ngold: '{a}'\ncompletion: ' {gold}'\nmax_new_tokens: 5\n"))
    assert own.spec.metric == "contains" and own.items[0].conversation.prompt_text == "Q: Say so.\nA:" and own.name == "own"


WRONG = {
    "no task is called 'bolq'; did you mean 'boolq'": lambda p: tasks.load("bolq"),
    "its rows are not part of this package": lambda p: tasks.load("boolq"),
    "holds none of test.json": lambda p: tasks.load("boolq", p),
    "no file or folder": lambda p: tasks.load("boolq", p / "nowhere"),
    "test.json:2: answer: 'perhaps' is not among the choices true, false":
        lambda p: tasks.load("boolq", put(p, [ROWS[0] | {"answer": "perhaps"}])),
    "names no choices": lambda p: tasks.load("boolq", put(p, [{"instruction": "Is it?", "answer": "true"}])),
    "holds no number": lambda p: tasks.load("AddSub", put(p, [SUMS[0] | {"answer": "four"}])),
    "instruction: missing; the row has question, answer":
        lambda p: tasks.load("AddSub", put(p, [{"question": "?", "answer": "1"}])),
    "need a task.yaml": lambda p: tasks.load(put(p, [{"question": "?", "answer": "1"}])),
    "metrik: unknown key; did you mean 'metric'": lambda p: tasks.load(put(p, SUMS, "metrik: exact")),
    "metric: 'exakt' is not one of": lambda p: tasks.load(put(p, SUMS, "metric: exakt")),
    "choices: metric choice needs at least two": lambda p: tasks.load(put(p, SUMS, "metric: choice")),
    "like: no task is called 'gsm'": lambda p: tasks.load(put(p, SUMS, "like: gsm")),
    "max_new_tokens: expected int, found 'many'": lambda p: tasks.load(put(p, SUMS, "max_new_tokens: many")),
    "prompt: broken template": lambda p: tasks.load(put(p, SUMS, "prompt: '{instruction'")),
    "only plain": lambda p: tasks.load(put(p, SUMS, "prompt: '{instruction!r}'")),
    "pattern: not a regular expression": lambda p: tasks.load(put(p, SUMS, "pattern: '(('")),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_task_that_does_not_fit_is_told_in_one_line(reason, tmp_path):
    with pytest.raises(UserError) as caught:
        WRONG[reason](tmp_path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


# Scores

@pytest.mark.parametrize("way", ["generation", "likelihood", "likelihood-norm"])
def test_the_answers_are_those_of_every_row_alone_by_transformers(way, tmp_path, plain):
    model, task, renderer = model_of(), tasks.load("boolq", put(tmp_path, ROWS)), Renderer(TOKENIZER)
    rows, limit = plain.plain_rows("boolq", tmp_path / "test.json", 99), room(model)
    found = score(model, task, choice_by=way)
    want = []
    for r in rows:
        if way == "generation":
            want.append(plain.plain_answer(model, TOKENIZER, r["prompt"], 8, list(renderer.stop_ids), limit))
        else:
            losses = plain.plain_losses(model, TOKENIZER, r["prompt"], [t for _, t in r["options"]], renderer.stop_id, limit)
            want.append(plain.likeliest(losses, r["options"], way == "likelihood-norm"))
    assert list(found.answers) == want and len(set(want)) > 1
    assert found.n == len(found.rows) == 13 and found.interval == wilson(round(sum(found.rows)), 13)
    assert found.also == {"majority": max(sum(r["answer"] == a for r in ROWS) for a in ("true", "false", "maybe")) / 13}
    assert found.value == sum(found.rows) / 13 and found.plain()["value"] == found.plain()["accuracy"] == found.value
    for size in (1, 64):
        assert score(model, task, choice_by=way, batch_size=size) == found


def test_padding_on_either_side_gives_the_same_likelihoods(tmp_path):
    model = model_of()
    examples, _ = Renderer(TOKENIZER).examples(tasks.load("boolq", put(tmp_path, ROWS)).conversations, 999)
    right, counts = row_losses(model, examples, PAD, max_tokens=4096)
    batch, left = collate(examples, [[i] for i in range(len(examples))], PAD), []
    width = batch.ids.shape[1]
    for n, e in enumerate(examples):
        batch.ids[n] = torch.tensor([PAD] * (width - len(e.ids)) + e.ids)
    mask = torch.tensor([[0] * (width - len(e.ids)) + [1] * len(e.ids) for e in examples])
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for n in range(len(examples)):
        each = F.cross_entropy(logits[n, :-1], batch.ids[n, 1:], reduction="none")
        left.append(float(each[-int(counts[n]):].sum()))
    assert max(abs(a - b) for a, b in zip(right.tolist(), left, strict=True)) < 1e-10 and len({len(e.ids) for e in examples}) > 3


KINDS = {
    "exact": ({}, lambda said: said.strip()), "contains": ({}, lambda said: said.strip()[1:4]),
    "regex": ({"pattern": r"\w+"}, lambda said: said), "bleu": ({}, lambda said: said), "rouge_l": ({}, lambda said: said),
}


@pytest.mark.parametrize("metric", KINDS)
def test_every_metric_tells_right_from_wrong(metric, tmp_path):
    """Half of the rows expect what the model is known to say."""
    if metric == "rouge_l":
        pytest.importorskip("rouge_score")
    model, (more, told) = model_of(), KINDS[metric]
    rows = [{"instruction": f"Go on {w}", "answer": "x"} for w in ("one", "two three", "four", "so so so", "seven eight", "ten")]
    base = tasks.load(put(tmp_path / "a", rows, "metric: exact\n"))
    said = score(model, base, max_new_tokens=24).answers
    expected = [told(s) if n % 2 and told(s).strip() else "qqqq zz" for n, s in enumerate(said)]
    task = tasks.load(put(tmp_path / "b", [r | {"answer": a} for r, a in zip(rows, expected, strict=True)], f"metric: {metric}\n"))
    found = score(model, task, max_new_tokens=24, **more)
    good = [v > 50 if metric in ("bleu", "rouge_l") else v == 1 for v in found.rows]
    assert good == [bool(n % 2 and told(s).strip()) for n, s in enumerate(said)] and any(good), (said, found.rows)
    assert found.metric == (metric if metric in ("bleu", "rouge_l") else "accuracy") and len(found.interval) == 2


def test_numbers_are_compared_as_numbers(tmp_path):
    model, task = model_of(), tasks.load(put(tmp_path, SUMS))
    golds, said = ("3", "4.0", "1,000", "-2", "0.5", "7", "8", "9"), ("so 3.0004", "4", "$1000", "\u22122", "1/2", "", "88", "9.")
    items = tuple(dataclasses.replace(i, gold=g) for i, g in zip(task.items, golds, strict=True))
    how = Scoring(metric="number")
    assert [right(how, a, g) for a, g in zip(said, golds, strict=True)] == [True] * 5 + [False] * 2 + [True]
    found = score(model, dataclasses.replace(task, items=items))
    assert found.metric == "accuracy" and found.n == 8


def test_perplexity_is_that_of_all_tokens_together(tmp_path):
    (tmp_path / "test.txt").write_text("Once upon a time there was a cat. " * 30)
    found = score(model_of(), tasks.load("perplexity", tmp_path), limit=64)
    total = sum(r.stats[0] for r in found.results) / sum(r.stats[1] for r in found.results)
    assert found.metric == "perplexity" in LOWER and found.value == pytest.approx(math.exp(total), rel=1e-12)
    assert found.n == len(found.rows) > 3 and found.interval[0] < found.value < found.interval[1]
    assert found.better_than(found.value + 1) and not found.better_than(found.value - 1)


def test_e2e_has_one_answer_a_meaning_and_both_of_its_scores(tmp_path):
    pytest.importorskip("rouge_score")
    (tmp_path / "test.txt").write_text("name : A | food : B||A serves B .\nname : A | food : B||B is served at A .\n"
                                       "name : C||C is C .\n")
    task = tasks.load("e2e", tmp_path)
    found = score(model_of(), task, max_new_tokens=12)
    assert len(task.items) == 3 and found.n == len(found.answers) == 2 and {"bleu", "rouge_l"} <= set(found.plain())


def test_a_row_too_long_for_the_model_is_wrong_in_its_place_and_no_error(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"instruction": "so " * 900 + ROWS[1]["instruction"]}, *ROWS[2:5]]
    model, task = model_of(), tasks.load("boolq", put(tmp_path, rows))
    for way in ("generation", "likelihood"):
        found = score(model, task, choice_by=way)
        assert found.unanswered == found.plain()["unanswered"] == 1 and found.rows[1] == 0 and found.answers[1] == ""
        alone = score(model, dataclasses.replace(task, items=task.items[2:]), choice_by=way)
        assert found.answers[2:] == alone.answers


def test_the_evaluations_keys_win_over_the_tasks(tmp_path):
    task = tasks.load("boolq", put(tmp_path, ROWS))
    assert tasks.scoring(task, EvalConfig()).choice_by == "generation" and tasks.scoring(task, EvalConfig()).max_new_tokens == 32
    how = tasks.scoring(task, EvalConfig(metric="exact", max_new_tokens=3, until=["x"]))
    assert (how.metric, how.max_new_tokens, how.until) == ("exact", 3, ("x",))
    with pytest.raises(UserError, match="its rows have no choices"):
        tasks.scoring(tasks.load(put(tmp_path / "s", SUMS)), EvalConfig(metric="choice"))
    assert score(model_of(), task, max_rows=4).n == 4


def test_what_comes_after_an_answer_is_cut_off(tmp_path):
    model, task = model_of(), tasks.load(put(tmp_path, SUMS, "metric: exact\n"))
    whole = score(model, task).answers
    end = next(c for a in whole for c in a[1:] if c.strip())
    assert [a.partition(end)[0] for a in whole] == list(score(model, task, until=[end]).answers) != list(whole)


def test_chat_templates_of_every_kind_are_scored(tmp_path):
    task = tasks.load("boolq", put(tmp_path, ROWS[:4]), chat=True)
    for style in ("chatml", "llama2", "rewrites"):
        tokenizer, _ = styled(style)
        model = llama(F64, vocab_size=len(tokenizer), max_position_embeddings=1024)
        assert score(model, task, tokenizer, choice_by="likelihood").n == 4


@pytest.mark.parametrize("name", ["boolq", "mathqa", "sst2"])
def test_real_rows_on_a_real_model_are_scored_as_one_by_one(name, plain):
    from tsugiki.load import load
    model, tokenizer = load(str(data_dir("models", "stories260k-hf")), dtype="fp32")
    data = {"sst2": ("glue",)}.get(name, ("llm-adapters", "dataset"))
    ways = ("likelihood",) if name == "sst2" else ("likelihood", "generation")
    assert plain.check(name, model, tokenizer, str(data_dir(*data)), 4, 8, ways)


def test_the_librarys_verbs_take_a_task(tmp_path):
    import tsugiki as tg
    model, folder = llama(max_position_embeddings=512), str(put(tmp_path / "t", ROWS))
    found = tg.evaluate(model, TOKENIZER, task=folder, choice_by="likelihood", max_rows=5)
    assert found.n == 5 and found.metric == "accuracy"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": r["instruction"], "completion": r["answer"]}) + "\n" for r in ROWS))
    result = tg.train(model, TOKENIZER, rows, tmp_path / "run", task=folder, steps=2, eval_steps=1, keep="best", quiet=True)
    assert result.progress.after["metric"] == "accuracy" and result.progress.after["n"] == 13
    with pytest.raises(UserError, match="give data or task"):
        tg.evaluate(model, TOKENIZER)

"""Check task scores against a plain re-computation: one row at a time, transformers alone, no batch, no cache.

    python scripts/check_tasks.py --base ./my-model --data ./dataset --tasks boolq ARC-Easy --rows 200

For each task the package scores the first rows in batches; then every row is asked again by the functions here, which share no
code with it: prompts are put together by hand, answers are `model.generate` without a cache, a choice is the least sum of
cross-entropies of its tokens. All answers must be the same. Exit code 1 if one is not. Also tells how many rows the extraction
rules of LLM-Adapters' evaluate.py judge otherwise.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
PAD16 = " " * 16
LETTERS = ("AQuA", "mathqa")
NUMBERS = ("MultiArith", "AddSub", "SingleEq", "SVAMP", "mawps", "gsm8k")
CHOICES = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")


def paper_extract(task: str, sentence: str) -> str | float:
    """What LLM-Adapters' evaluate.py and commonsense_evaluate.py take for the answer (arXiv 2304.01933), as they are."""
    if task in NUMBERS:
        found = re.findall(r"-?\d+\.?\d*", sentence.replace(",", ""))
        return float(found[-1]) if found else float("inf")
    patterns = {"boolq": "true|false", "piqa": "solution1|solution2", "hellaswag": "ending1|ending2|ending3|ending4",
                "winogrande": "option1|option2"} | dict.fromkeys(LETTERS, "A|B|C|D|E")
    found = re.findall(patterns.get(task, "answer1|answer2|answer3|answer4|answer5"), sentence.strip())
    return found[0] if found else ""


def paper_right(task: str, sentence: str, gold: str) -> bool:
    got = paper_extract(task, sentence)
    return abs(float(gold) - got) <= 0.001 if task in NUMBERS else got == gold


def paper_prompt(instruction: str) -> str:
    return f"{HEAD}{PAD16}### Instruction:\n{PAD16}{instruction}\n\n{PAD16}### Response:\n{PAD16}"


def plain_rows(task: str, file: Path, rows: int) -> list[dict]:
    """prompt, gold and the (choice, text) pairs of each row, read and put together by hand."""
    if task == "sst2":
        cells = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:rows + 1]]
        words = ("bad", "good")
        return [{"prompt": f"{s}\nThis was", "gold": words[int(n)], "options": [(w, f" {w}") for w in words]} for s, n in cells]
    if task == "e2e":
        import csv
        with open(file, encoding="utf-8", newline="") as f:
            return [{"prompt": f"{mr} ||", "gold": ref, "options": []} for mr, ref in list(csv.reader(f))[1:rows + 1]]
    text = file.read_text(encoding="utf-8")
    values = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    found = []
    for row in values[:rows]:
        asked, answer = row.get("instruction", row.get("question")), row["answer"]
        offered = re.search(r"Answer format: *([^\n]+?)\s*$", asked) if task in CHOICES else None
        says = "the correct answer is {}" if task in CHOICES else "The answer is {}."
        options = offered[1].split("/") if offered else "ABCDE" if task in LETTERS else ""
        found.append({"prompt": paper_prompt(asked), "gold": answer, "options": [(c, says.format(c)) for c in options]})
    return found


@torch.no_grad()
def plain_answer(model, tokenizer, prompt: str, longest: int, stop: list[int], limit: int | None) -> str | None:
    """The greedy answer to one prompt; None where it leaves no room."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    if limit and ids.shape[1] >= limit:
        return None
    new = min(longest, limit - ids.shape[1]) if limit else longest
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=False,
                         num_beams=1, eos_token_id=stop, pad_token_id=0)[0, ids.shape[1]:].tolist()
    end = next((n for n, i in enumerate(out) if i in stop), len(out))
    return tokenizer.decode(out[:end], skip_special_tokens=True)


@torch.no_grad()
def plain_losses(model, tokenizer, prompt: str, answers: list[str], stop: int, limit: int | None) -> list[tuple[float, int]] | None:
    """(sum of cross-entropies, tokens) of each answer after one prompt, its stop token included, from all logits of that row."""
    found, before = [], tokenizer(prompt)["input_ids"]
    for answer in answers:
        whole = tokenizer(prompt + answer)["input_ids"]
        if whole[:len(before)] != before:             # the first characters fused with the prompt: take them after a line's end
            line = tokenizer("\n", add_special_tokens=False)["input_ids"]
            whole = before + tokenizer("\n" + answer, add_special_tokens=False)["input_ids"][len(line):]
        whole = [*whole, stop]
        if limit and len(whole) > limit:
            return None
        logits = model(input_ids=torch.tensor([whole])).logits[0]
        each = F.cross_entropy(logits[:-1].double(), torch.tensor(whole[1:]), reduction="none")
        found.append((float(each[len(before) - 1:].sum()), len(whole) - len(before)))
    return found


def likeliest(losses: list[tuple[float, int]] | None, options: list[tuple[str, str]], by_length: bool = False) -> str | None:
    if losses is None:
        return None
    values = [total / count if by_length else total for total, count in losses]
    return options[values.index(min(values))][0]


def check(name: str, model, tokenizer, data: str, rows: int, longest: int | None, ways: tuple[str, ...]) -> bool:
    """One task in the package's way and in the plain one; prints a line a way."""
    from tsugiki.config import EvalConfig
    from tsugiki.data import Renderer
    from tsugiki.evaluate import tasks
    from tsugiki.evaluate.answers import room
    renderer, limit, good = Renderer(tokenizer), room(model), True
    task = tasks.load(name, data, rows)
    plain = plain_rows(name, task.file, rows)
    assert [i.conversation.prompt_text for i in task.items] == [r["prompt"] for r in plain], f"{name}: the prompts differ"
    for way in ways if task.items[0].options else ("generation",):
        cfg = EvalConfig(choice_by=way, max_new_tokens=longest)
        how, began = tasks.scoring(task, cfg), time.monotonic()
        score = tasks.score(model, renderer, task, cfg, 0, limit or 1 << 20)
        took, began, answers, stop = time.monotonic() - began, time.monotonic(), {}, list(renderer.stop_ids)
        for r in plain:
            if r["prompt"] in answers:
                continue
            if way == "generation":
                said = plain_answer(model, tokenizer, r["prompt"], how.max_new_tokens, stop, limit)
                for end in how.until:
                    said = said and said.partition(end)[0]
            else:
                losses = plain_losses(model, tokenizer, r["prompt"], [text for _, text in r["options"]], renderer.stop_id, limit)
                said = likeliest(losses, r["options"], way == "likelihood-norm")
            answers[r["prompt"]] = said or ""
        same = sum(answers[r.prompt].strip() == r.answer.strip() for r in score.results)
        good &= same == len(score.results)
        other = sum(paper_right(name, r.answer, r.expected) != bool(v) for r, v in zip(score.results, score.rows, strict=True)
                    ) if way == "generation" and name in (*CHOICES, *LETTERS, *NUMBERS) and task.file.suffix == ".json" else "-"
        print(f"{name:14} {way:16} same answers {same}/{len(score.results)}   {score.metric} {score.value:.4f}   "
              f"too long {score.unanswered}   judged otherwise by the paper's rules {other}   {took:.1f} s, "
              f"plain {time.monotonic() - began:.1f} s", flush=True)
    return good


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="embedded")
    p.add_argument("--data", required=True, help="the folder above the tasks' folders, or NAME=DIR for some", nargs="+")
    p.add_argument("--tasks", nargs="+", required=True)
    p.add_argument("--rows", type=int, default=200)
    p.add_argument("--max-new-tokens", type=int, default=None)
    p.add_argument("--ways", nargs="+", default=["generation", "likelihood", "likelihood-norm"])
    p.add_argument("--dtype", default="fp32")
    args = p.parse_args()
    import transformers

    from tsugiki.load import load
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load(args.base, dtype=args.dtype)
    where = dict(d.split("=", 1) for d in args.data if "=" in d)
    root = next((d for d in args.data if "=" not in d), None)
    results = [check(t, model, tokenizer, where.get(t, root), args.rows, args.max_new_tokens, tuple(args.ways)) for t in args.tasks]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

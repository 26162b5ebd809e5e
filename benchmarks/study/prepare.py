"""Write the study's data files: rows of SST-2, E2E and BoolQ in a small fixed drawing, and a novel the base has not read.

    python benchmarks/study/prepare.py --data DIR --out runs/study-data

DIR holds glue/SST-2/{train_full,dev}.tsv, e2e/original/{devset,testset_w_refs}.csv, llm-adapters/dataset/boolq/{train,test}.json
and novels/Burnett_Garden_1911.txt. E2E's training file is not to be had, so its development file is trained on. No phrase of SST-2
that is trained on is a piece of a sentence that is scored, and no record of E2E
stands in two of its files.
"""
from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from methods_sst2 import read  # noqa: E402

from tsugiki.data import Conversation  # noqa: E402

SST2_ROWS, BOOLQ_ROWS, BOOLQ_TEST = 4000, 3000, 800
E2E_RECORDS, E2E_HELD_OUT = 100, 40                   # of the test file, and of the training one to choose rates on
GENERAL = 80_000                                      # characters of the novel, from its middle


def pairs(rows: Sequence[Conversation]) -> list[dict]:
    return [{"prompt": c.messages[0].content, "completion": c.messages[1].content} for c in rows]


def sst2(data: Path) -> dict[str, list[dict]]:
    found = read(str(data / "glue" / "SST-2"), SST2_ROWS)
    return {"sst2-train": pairs(found.train), "sst2-validation": pairs(found.held_out), "sst2-test": pairs(found.dev)}


def e2e(data: Path) -> dict[str, list[dict]]:
    def records(name: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        with open(data / "e2e" / "original" / name, encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f):
                found.setdefault(row["mr"], []).append(row["ref"])
        return found
    train, test = records("devset.csv"), records("testset_w_refs.csv")
    chosen = sorted(mr for mr in test if mr not in train)
    random.Random(0).shuffle(chosen)
    held_out = random.Random(0).sample(sorted(train), E2E_HELD_OUT)
    return {"e2e-train": [row(mr, ref) for mr, refs in train.items() if mr not in held_out for ref in refs],
            "e2e-validation": [row(mr, ref) for mr in held_out for ref in train[mr]],
            "e2e-test": [row(mr, ref) for mr in chosen[:E2E_RECORDS] for ref in test[mr]]}


def row(mr: str, ref: str) -> dict:
    return {"prompt": f"{mr}\n", "completion": " ".join(ref.split())}


def boolq(data: Path) -> dict[str, list[dict]]:
    def rows(name: str, count: int) -> list[dict]:
        found = json.loads((data / "llm-adapters" / "dataset" / "boolq" / name).read_text(encoding="utf-8"))
        random.Random(0).shuffle(found)
        asked = [(r["instruction"].partition("question: ")[2].partition("\n")[0], r["answer"]) for r in found[:count]]
        return [{"prompt": f"{question}\nAnswer:", "completion": f" {answer}"} for question, answer in asked]
    return {"boolq-train": rows("train.json", BOOLQ_ROWS), "boolq-test": rows("test.json", BOOLQ_TEST)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of glue, e2e, llm-adapters and novels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (sst2(args.data) | e2e(args.data) | boolq(args.data)).items():
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        print(f"{name}: {len(rows):,} rows")
    text = (args.data / "novels" / "Burnett_Garden_1911.txt").read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    start = len(text) // 2
    (args.out / "general.txt").write_text(text[start:start + GENERAL], encoding="utf-8")


if __name__ == "__main__":
    main()

"""Rows: every file kind gives the same records, in order, with the line each starts on."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil

import pytest
from tokenizers_tiny import data_dir

from tsugiki.data.rows import READERS, Problem, raise_problems, read
from tsugiki.errors import UserError

RECORDS = [
    {"text": "plain", "label": "0"},
    {"text": 'a "quoted", comma', "label": "1"},
    {"text": "日本語 🎉 é", "label": "2"},
    {"text": " spaces  ", "label": ""},
    {"text": "", "label": "4"},
    {"text": "\u2028 line separator \x85", "label": "5"},
]


def write(path, kind: str, records=RECORDS, bom: bool = False, newline: str = "\n") -> None:
    if kind == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), buffer)
        data = buffer.getvalue()
    elif kind in (".json", ".jsonl", ".ndjson"):
        rows = [json.dumps(r, ensure_ascii=False) for r in records]
        text = "[\n" + ",\n".join(rows) + "\n]\n" if kind == ".json" else "".join(r + "\n" for r in rows)
        data = text.replace("\n", newline).encode()
    elif kind == ".csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(records[0]), lineterminator=newline)
        writer.writeheader()
        writer.writerows(records)
        data = out.getvalue().encode()
    else:
        lines = ["\t".join(records[0]), *("\t".join(r.values()) for r in records)]
        data = "".join(line + newline for line in lines).encode()
    data = b"\xef\xbb\xbf" * bom + data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


FIRST = {".json": 2, ".jsonl": 1, ".ndjson": 1, ".csv": 2, ".tsv": 2, ".parquet": 1}


@pytest.mark.parametrize("bom,newline", [(False, "\n"), (True, "\r\n")])
@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", FIRST)
def test_every_kind_of_file_gives_the_same_records_with_their_lines(tmp_path, kind, gz, bom, newline):
    if kind == ".parquet" and bom:
        pytest.skip("a binary file has neither BOM nor line ends")
    path = tmp_path / f"d{kind}{gz}"
    write(path, kind, bom=bom, newline=newline)
    rows = list(read(path))
    assert [r.fields for r in rows] == RECORDS
    assert [r.line for r in rows] == list(range(FIRST[kind], FIRST[kind] + len(RECORDS)))
    assert {r.file for r in rows} == {str(path)}


def test_every_reader_is_covered_here():
    assert {*FIRST, ".txt"} == set(READERS)


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_a_text_file_is_one_document(tmp_path, gz):
    path = tmp_path / f"novel.txt{gz}"
    data = b"\xef\xbb\xbfCHAPTER I\r\n\r\nIt was a dark night.\r\n"
    path.write_bytes(gzip.compress(data) if gz else data)
    (row,) = read(path)
    assert row.fields == {"text": "CHAPTER I\n\nIt was a dark night.\n"} and row.line == 1


def test_json_lines_are_counted_wherever_an_object_starts(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('\n\n [ {"a": 1,\n "b": 2}, {"a": 3}\n,\n\n{"a":\n4} ]  \n')
    assert [(r.fields, r.line) for r in read(path)] == [({"a": 1, "b": 2}, 3), ({"a": 3}, 4), ({"a": 4}, 7)]
    path.write_text('\n{"one": "object"}\n')
    assert [(r.fields, r.line) for r in read(path)] == [({"one": "object"}, 2)]


def test_csv_records_may_span_lines_and_tsv_quotes_are_characters(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('a,b\n"one\ntwo\n",x\ny,"z"\n\n\n')
    assert [(r.fields, r.line) for r in read(path)] == [({"a": "one\ntwo\n", "b": "x"}, 2), ({"a": "y", "b": "z"}, 5)]
    path = tmp_path / "d.tsv"
    path.write_text('a\tb\n"one\t1\nit\'s "two"\t2\n')
    assert [(r.fields, r.line) for r in read(path)] == [({"a": '"one', "b": "1"}, 2), ({"a": 'it\'s "two"', "b": "2"}, 3)]


def test_blank_lines_between_json_lines_hold_no_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('\n{"a": 1}\n\n  \n{"a": 2}')
    assert [(r.fields["a"], r.line) for r in read(path)] == [(1, 2), (2, 5)]


def test_reading_goes_on_after_a_bad_line_and_collects_every_problem(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n[1]\n{"a": 2}\n')
    problems: list[Problem] = []
    assert [r.fields["a"] for r in read(path, problems)] == [1, 2]
    assert [p.line for p in problems] == [2, 3, 4]
    with pytest.raises(UserError) as e:
        list(read(path))
    assert str(e.value).startswith(f"{path}:2: row: not valid JSON")


def test_a_message_never_has_more_than_three_lines_nor_control_characters():
    problems = [Problem("f.jsonl", n, "text\n\x1b[31m", "bad\nly") for n in range(1, 10)]
    with pytest.raises(UserError) as e:
        raise_problems(problems)
    lines = str(e.value).splitlines()
    assert lines[0] == "f.jsonl:1: text??[31m: bad?ly" and len(lines) == 3
    assert lines[2] == "... and 7 more (tsugiki data check f.jsonl lists all)"


def test_rows_are_streamed_not_gathered(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n' * 3 + "broken\n")
    rows = read(path)
    assert next(rows).line == 1 and next(rows).line == 2


def test_real_files_are_read_whole():
    counts = {
        ("chat-formats", "alpaca_en_demo.json"): 999,
        ("glue", "SST-2", "train_full.tsv"): 67_349,
        ("e2e", "original", "devset.csv"): 4672,
        ("gsm8k", "train.jsonl"): 7473,
    }
    for parts, n in counts.items():
        assert sum(1 for _ in read(data_dir(*parts))) == n


def test_the_broken_lines_of_a_real_file_are_all_found():
    problems: list[Problem] = []
    rows = sum(1 for _ in read(data_dir("alpaca-libre", "alpaca_libre_tasks_v2.jsonl"), problems))
    assert len(problems) == 14 and rows == 2294 - 14
    assert all(p.field == "row" and "not valid JSON" in p.reason for p in problems)


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n')
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        with pytest.raises(UserError, match="permission denied"):
            list(read(path))
    else:
        pytest.skip("this user may read everything")
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)

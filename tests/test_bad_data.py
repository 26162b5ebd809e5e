"""Broken data: each kind of defect is refused in at most three lines that name file, line, field and reason."""

from __future__ import annotations

import gzip
import io
import json
import random

import pytest

from tsugiki.data import Columns, load_conversations
from tsugiki.errors import UserError

OK = '{"instruction": "Add 2 and 2.", "input": "", "output": "4"}\n'
TABLE = Columns("Review: {text}\nSentiment:", " {label}", {"0": "bad", "1": "good"})


def messages(*turns: object) -> str:
    return json.dumps({"messages": list(turns)}) + "\n"


def turn(role: object, content: object = "x", **more: object) -> dict:
    return {"role": role, "content": content, **more}


def parquet(columns: dict) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


GOOD = messages(turn("user"), turn("assistant"))
# name: (file, content, "line: field: reason" as far as it is promised, options)
CASES: dict[str, tuple] = {
    # the file
    "empty": ("d.jsonl", "", "1: file: is empty"),
    "only white space": ("d.jsonl", "\n \n\n", "1: file: is empty"),
    "empty json": ("d.json", "  \n", "1: file: is empty"),
    "empty csv": ("d.csv", "", "1: file: is empty"),
    "empty txt": ("d.txt", "\r\n \r\n", "1: file: is empty"),
    "empty array": ("d.json", "\n[ ]\n", "2: file: holds an empty array"),
    "header only": ("d.csv", "prompt,completion\n", "1: file: a header (prompt, completion) without rows"),
    "parquet without rows": ("d.parquet", lambda: parquet({"text": []}), "1: file: holds no rows"),
    "unknown kind": ("d.xlsx", "x", "unknown kind '.xlsx'; allowed: .json .jsonl .ndjson .csv .tsv .parquet .txt (each also .gz)"),
    "misspelt kind": ("d.jsnl", "x", "did you mean '.jsonl'?"),
    "no kind": ("data", "x", "unknown kind 'data'"),
    "pickle": ("d.pkl", b"\x80\x04.", "unknown kind '.pkl'"),
    "not gzip": ("d.jsonl.gz", OK, "1: file: damaged gzip"),
    "truncated gzip": ("d.jsonl.gz", gzip.compress(OK.encode() * 9)[:-9], "file: damaged gzip"),
    "gzip with a wrong checksum": ("d.json.gz", gzip.compress(f"[{OK}]".encode())[:-8] + b"\0" * 8, "file: damaged gzip"),
    "truncated parquet": ("d.parquet", lambda: parquet({"text": ["a"] * 99})[:-20], "1: file: damaged parquet file"),
    "not parquet": ("d.parquet", OK, "1: file: damaged parquet file"),
    # bytes
    "bad byte": ("d.jsonl", OK.encode() + b'{"instruction": "\xff"}\n', "2: row: not UTF-8: byte 0xff at byte 18 of the line"),
    "bad byte in json": ("d.json", b'[\n{"text": "a"},\n{"text": "\xe9"}]', "3: row: not UTF-8: byte 0xe9"),
    "bad byte in csv": ("d.csv", b"text,label\na,0\n\xfcber,1\n", "3: row: not UTF-8: byte 0xfc at byte 1", TABLE),
    "bad byte in txt": ("d.txt", b"one\ntwo \x80\n", "2: row: not UTF-8: byte 0x80 at byte 5"),
    "utf-16": ("d.jsonl", OK.encode("utf-16"), "1: row: not UTF-8: byte 0xff at byte 1 of the line; the file looks like UTF-16"),
    "nul byte": ("d.tsv", "text\tlabel\na\0b\t1\n", "2: row: holds a NUL character", TABLE),
    "nul escape": ("d.jsonl", '{"text": "a\\u0000b"}\n', "1: text: holds a NUL character (\\u0000)"),
    "half a surrogate pair": ("d.jsonl", '{"text": "a"}\n{"text": "\\ud83d!"}\n', "2: text: holds half of a surrogate pair"),
    "huge line": (
        "d.jsonl",
        lambda: b'{"text": "' + b"a" * (64 << 20) + b'"}\n' + b'{"text": "b"}\n',
        "1: row: line longer than 64 MB",
    ),
    # JSON
    "truncated line": ("d.jsonl", OK + OK[:20], "2: row: not valid JSON: Unterminated string"),
    "single quotes": ("d.jsonl", "{'text': 'a'}\n", "1: row: not valid JSON: Expecting property name enclosed in double quotes"),
    "trailing comma": ("d.jsonl", '{"text": "a",}\n', "1: row: not valid JSON"),
    "two objects on a line": ("d.jsonl", '{"text": "a"} {"text": "b"}\n', "1: row: more after the object, from column 15"),
    "spread over lines": ("d.jsonl", '{\n"text": "a"\n}\n', "one object a line, an array goes in a .json file"),
    "array in jsonl": ("d.jsonl", f"[{OK.strip()}]", "1: row: is a list, not an object; an array goes in a .json file"),
    "a list as row": ("d.jsonl", OK + '["a", "b"]\n', "2: row: is a list, not an object"),
    "a number as row": ("d.jsonl", OK + "42\n", "2: row: is a number, not an object"),
    "a string in the array": ("d.json", f'[{OK}, "a"]', "2: row: is text, not an object"),
    "key twice": ("d.jsonl", '{"text": "a", "text": "b"}\n', "1: text: key appears twice"),
    "nan": ("d.jsonl", '{"text": "a", "score": NaN}\n', "1: row: NaN is not a JSON number"),
    "infinity": ("d.json", '[{"text": "a", "score": -Infinity}]', "1: row: -Infinity is not a JSON number"),
    "too large a number": ("d.jsonl", '{"text": "a", "score": 1e999}\n', "1: row: number 1e999 is too large"),
    "endless integer": ("d.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}\n", "1: row: not valid JSON: Exceeds the limit"),
    "too deep": ("d.jsonl", OK + '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n", "2: row: nested too deeply"),
    "array without end": ("d.json", f"[{OK},\n{OK}", "4: row: expected ',' or ']' after an object; nothing after it was read"),
    "array with a hole": ("d.json", f"[{OK},,{OK}]", "2: row: not valid JSON: Expecting value at column 2"),
    "more after the array": ("d.json", f"[{OK}] x", "2: file: more after the end of the array"),
    "lines in json": ("d.json", OK + OK, "2: file: more after the end of the object; one object a line is .jsonl"),
    "text in json": ("d.json", "hello", "1: file: must hold an array of objects, or one object"),
    # tables
    "too few columns": ("d.tsv", "text\tlabel\na\t0\nb\n", "3: row: 1 column where the header has 2 (text, label)", TABLE),
    "too many columns": ("d.csv", "text,label\na,b,0\n", "2: row: 3 columns where the header has 2 (text, label)", TABLE),
    "column twice": ("d.csv", "text,text\na,b\n", "1: text: column appears twice in the header"),
    "open quote": ("d.csv", 'text,label\na,0\n"b,1\nc,0\n', "3: row: not valid CSV: a quote is opened and never closed", TABLE),
    "quote in the middle": ("d.csv", 'text,label\n"a"b,0\n', "2: row: not valid CSV: ',' expected after '\"'", TABLE),
    "blank line inside": ("d.tsv", "text\tlabel\na\t0\n\nb\t1\n", "3: row: is blank", TABLE),
    "label without a word": ("d.tsv", "text\tlabel\na\t0\nb\t2\n", "3: label: value '2' is not among the labels: 0, 1", TABLE),
    "label missing": ("d.tsv", "text\tlabel\na\t\n", "2: label: value '' is not among the labels", TABLE),
    "unknown column": ("d.tsv", "texts\tlabel\na\t0\n", "2: text: missing; the row has texts, label; did you mean 'texts'?", TABLE),
    "null in a column": ("d.jsonl", '{"text": null, "label": 0}\n', "1: text: is null, not text", TABLE),
    # shapes
    "no known shape": (
        "d.jsonl",
        '{"question": "a", "reply": "b"}\n',
        "1: row: fields question, reply fit no known shape: messages",
    ),
    "nearly a shape": ("d.jsonl", '{"prompt": "a", "completions": "b"}\n', "did you mean 'completion'?"),
    "two shapes": (
        "d.jsonl",
        '{"prompt": "a", "completion": "b", "messages": []}\n',
        "fit messages and prompt-completion; choose one with --format",
    ),
    "preference pairs": (
        "d.jsonl",
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        "1: row: preference pairs (chosen, rejected)",
    ),
    "missing output": ("d.jsonl", OK + '{"instruction": "a"}\n', "2: output: missing; the row has instruction"),
    "misspelt field": (
        "d.jsonl",
        OK + '{"instruction": "a", "outptu": "b"}\n',
        "2: output: missing; the row has instruction, outptu; did you mean 'outptu'?",
    ),
    "null output": ("d.jsonl", '{"instruction": "a", "output": null}\n', "1: output: is null, not text"),
    "number as output": ("d.jsonl", '{"instruction": "a", "output": 4}\n', "1: output: is a number, not text"),
    "true as text": ("d.jsonl", '{"text": true}\n', "1: text: is true/false, not text"),
    "empty output": ("d.jsonl", OK + '{"instruction": "a", "output": " \\n"}\n', "2: output: is empty: no answer to train on"),
    "empty instruction": (
        "d.jsonl",
        '{"instruction": "", "input": " ", "output": "a"}\n',
        "1: instruction: is empty, and so is input",
    ),
    "odd history": (
        "d.jsonl",
        '{"instruction": "a", "output": "b", "history": [["q"]]}\n',
        "1: history[0]: is not a [question, answer] pair",
    ),
    "empty csv answer": ("d.csv", "prompt,completion\na,\n", "2: completion: is empty: no answer to train on"),
    "nested prompt": ("d.jsonl", '{"prompt": ["a"], "completion": "b"}\n', "1: prompt: is a list, not text"),
    "number in parquet": ("d.parquet", lambda: parquet({"text": [1.5]}), "1: text: is a number, not text"),
    # chats
    "messages as text": ("d.jsonl", '{"messages": "[]"}\n', "1: messages: is text, not a list of messages"),
    "no messages": ("d.jsonl", GOOD + messages(), "2: messages: is empty"),
    "a message as text": ("d.jsonl", messages("hi"), "1: messages[0]: is text, not an object with role and content"),
    "no role": ("d.jsonl", messages({"content": "a"}), "1: messages[0].role: missing; the message has content"),
    "no content": (
        "d.jsonl",
        messages(turn("user"), {"role": "assistant", "contents": "a"}),
        "1: messages[1].content: missing; the message has role, contents; did you mean 'contents'?",
    ),
    "unknown role": (
        "d.jsonl",
        messages(turn("user"), turn("asistant")),
        "1: messages[1].role: unknown role 'asistant'; known: system, developer, user, human, assistant, gpt, tool, "
        "observation; did you mean 'assistant'?",
    ),
    "role as number": ("d.jsonl", messages(turn(1)), "1: messages[0].role: is a number, not a role"),
    "content null": ("d.jsonl", messages(turn("user"), turn("assistant", None)), "1: messages[1].content: is null, not text"),
    "empty answer": ("d.jsonl", messages(turn("user"), turn("assistant", "")), "1: messages[1].content: is empty: no answer"),
    "picture": (
        "d.jsonl",
        messages(turn("user", [{"type": "image_url", "image_url": {}}])),
        "1: messages[0].content[0]: type 'image_url' is not text",
    ),
    "part without text": (
        "d.jsonl",
        messages(turn("user", [{"type": "text"}])),
        "1: messages[0].content[0].text: is null, not text",
    ),
    "tool call": (
        "d.jsonl",
        messages(turn("user"), turn("assistant", None, tool_calls=[{}])),
        "1: messages[1].tool_calls: tool_calls cannot be rendered",
    ),
    "function call": (
        "d.jsonl",
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]}\n',
        "1: conversations[1].from: function_call cannot be rendered",
    ),
    "tools": ("d.jsonl", '{"tools": "[{}]", "messages": []}\n', "1: tools: tool definitions cannot be rendered"),
    "question last": (
        "d.jsonl",
        messages(turn("user"), turn("assistant"), turn("user")),
        "1: messages[2]: the last message is from user; training needs an assistant answer last",
    ),
    "answer first": (
        "d.jsonl",
        messages(turn("assistant"), turn("user")),
        "1: messages[0]: assistant at the start, where user is expected",
    ),
    "two questions": (
        "d.jsonl",
        messages(turn("user"), turn("user"), turn("assistant")),
        "1: messages[1]: user after user, where assistant is expected",
    ),
    "system in the middle": (
        "d.jsonl",
        messages(turn("user"), turn("system"), turn("assistant")),
        "1: messages[1]: system after user",
    ),
    "system only": ("d.jsonl", messages(turn("system")), "1: messages[0]: the last message is from system"),
    "system twice": (
        "d.jsonl",
        json.dumps({"system": "a", "messages": [turn("system"), turn("user"), turn("assistant")]}),
        "1: system: given twice",
    ),
    "odd weight": (
        "d.jsonl",
        messages(turn("user"), turn("assistant", weight=0.5)),
        "1: messages[1].weight: is '0.5'; only 0 and 1 are known",
    ),
    "nothing trained": ("d.jsonl", messages(turn("user"), turn("assistant", weight=0)), "1: messages: every answer has weight 0"),
    "second row of an array": (
        "d.json",
        f"[\n{GOOD},\n\n{messages(turn('user'))}]",
        "5: messages[0]: the last message is from user",
    ),
}


def refused(path, columns=None, **options) -> str:
    """The loader's message; fails unless it is a UserError of one to three lines without control characters."""
    with pytest.raises(UserError) as e:
        load_conversations(path, columns=columns, **options)
    lines = str(e.value).split("\n")
    assert 1 <= len(lines) <= 3 and all(line.strip() and line.isprintable() for line in lines)
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_a_defect_is_refused_by_file_line_field_and_reason(tmp_path, name):
    file, content, expected, *columns = CASES[name]
    content = content() if callable(content) else content
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    line = refused(path, *columns)
    assert line.startswith(f"{path}:") and expected in line
    if expected[0].isdigit():
        assert line.startswith(f"{path}:{expected}")


def test_there_are_many_kinds_of_defect():
    assert len(CASES) >= 80


def test_a_file_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text(OK)
    assert refused(tmp_path / "trian.jsonl") == f"{tmp_path}/trian.jsonl: no such file; did you mean 'train.jsonl'?"
    assert refused(tmp_path / "nowhere" / "d.jsonl").endswith("d.jsonl: no such file")
    assert refused(tmp_path) == f"{tmp_path}: is a folder, not a file"


def test_many_defects_are_three_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(OK + "x\n" * 50)
    with pytest.raises(UserError) as e:
        load_conversations(path)
    lines = str(e.value).split("\n")
    assert [line.split(": ")[0] for line in lines[:2]] == [f"{path}:2", f"{path}:3"]
    assert lines[2] == f"... and 48 more (tsugiki data check {path} lists all)"


def good_bytes(kind: str, rows: int) -> bytes:
    texts = [f'Film number {n} was {"good" if n % 2 else "bad"}, "very" é 日本.' for n in range(rows)]
    if kind == "csv":
        quoted = [t.replace('"', '""') for t in texts]
        return "".join(
            ["text,label\n", *(f'"{t}",{n % 2}\n' if n % 3 else f"film {n},{n % 2}\n" for n, t in enumerate(quoted))]
        ).encode()
    if kind == "tsv":
        return "".join(["text\tlabel\n", *(f"{t}\t{n % 2}\n" for n, t in enumerate(texts))]).encode()
    made = [json.dumps({"text": t, "label": str(n % 2)}, ensure_ascii=bool(n % 2)) for n, t in enumerate(texts)]
    return ("[" + ",\n".join(made) + "]\n" if kind == "json" else "".join(m + "\n" for m in made)).encode()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three bytes replaced, removed, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out))
        byte = rng.choice(b"\0\n\r\t\"',:{}[]\\ \x80\xff\xc3aZ09") if rng.random() < 0.7 else rng.randrange(256)
        match rng.randrange(4):
            case 0:
                out[at] = byte
            case 1:
                del out[at]
            case 2:
                out.insert(at, byte)
            case 3:
                out[at:at] = out[at : at + rng.randint(1, 40)]
    return bytes(out)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz"])
def test_random_damage_is_refused_or_keeps_every_row(tmp_path, kind):
    rows = 30
    good = (
        parquet({"text": [f"text {n}" for n in range(rows)], "label": [str(n % 2) for n in range(rows)]})
        if kind == "parquet"
        else (gzip.compress(good_bytes("jsonl", rows)) if kind.endswith("gz") else good_bytes(kind, rows))
    )
    path = tmp_path / f"d.{kind}"
    path.write_bytes(good)
    assert len(load_conversations(path, columns=TABLE)) == rows
    rng = random.Random(kind)
    refusals = 0
    for _ in range(300):
        path.write_bytes(mutate(good, rng))
        try:
            assert len(load_conversations(path, columns=TABLE)) >= rows
        except UserError as e:
            assert 1 <= len(str(e).split("\n")) <= 3 and str(e).startswith(str(path))
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize("kind", ["json", "parquet", "jsonl.gz", "json.gz"])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    good = parquet({"text": ["a b c"] * 9, "label": ["0"] * 9}) if kind == "parquet" else good_bytes(kind.removesuffix(".gz"), 9)
    good = (gzip.compress(good) if kind.endswith("gz") else good).rstrip(b"\n")
    path = tmp_path / f"d.{kind}"
    for end in range(0, len(good) - 1, max(len(good) // 60, 1)):
        path.write_bytes(good[:end])
        refused(path, TABLE)

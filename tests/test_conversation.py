"""Conversations: each row shape is recognised and says the same thing; templates over columns cover any other table."""

from __future__ import annotations

import json

import pytest
from tokenizers_tiny import data_dir

from tsugiki.data import Columns, Conversation, Message, load_conversations
from tsugiki.data.conversation import collect
from tsugiki.errors import UserError

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))

SAME = (S("Be kind."), U("2+2?"), A("4"), U("Sure?"), A("Yes."))
CHATS = {
    "alpaca": {"system": "Be kind.", "history": [["2+2?", "4"]], "instruction": "Sure?", "input": "", "output": "Yes."},
    "messages": {
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": [{"type": "text", "text": "Su"}, {"type": "text", "value": "re?"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "Yes."}]},
        ]
    },
    "sharegpt": {
        "system": "Be kind.",
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "gpt", "value": "4"},
            {"from": "user", "value": "Sure?"},
            {"from": "assistant", "value": "Yes."},
        ],
    },
}


def load(tmp_path, *rows, **options) -> list[Conversation]:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_conversations(path, **options)


@pytest.mark.parametrize("format", ["auto", "named"])
@pytest.mark.parametrize("shape", CHATS)
def test_three_chat_shapes_say_the_same(tmp_path, shape, format):
    (c,) = load(tmp_path, {**CHATS[shape], "id": 7}, format="auto" if format == "auto" else shape)
    assert (c.kind, c.messages, c.where) == ("chat", SAME, f"{tmp_path}/d.jsonl:1")
    assert c.reference == "Yes." and c.prompt_text == "system: Be kind.\nuser: 2+2?\nassistant: 4\nuser: Sure?"


def test_plain_shapes(tmp_path):
    (c,) = load(tmp_path, {"prompt": "Q: 2+2? A:", "completion": " 4"})
    assert (c.kind, c.messages, c.reference, c.prompt_text) == ("plain", (U("Q: 2+2? A:"), A(" 4")), " 4", "Q: 2+2? A:")
    (c,) = load(tmp_path, {"text": "It was dark.", "url": "x"})
    assert (c.kind, c.messages, c.reference, c.prompt_text) == ("text", (A("It was dark."),), "It was dark.", "")
    (c,) = load(tmp_path, {"instruction": "Add.", "input": "2 2", "output": "4", "text": "all of it"})
    assert c.messages == (U("Add.\n2 2"), A("4"))
    (c,) = load(tmp_path, {"instruction": "Add.", "output": "4", "text": "all of it"}, format="text")
    assert c.messages == (A("all of it"),)


def test_tool_results_stand_between_two_answers(tmp_path):
    turns = [("human", "Weather?"), ("gpt", "I look."), ("observation", "rain"), ("gpt", "It rains.")]
    (c,) = load(tmp_path, {"conversations": [{"from": f, "value": v} for f, v in turns]})
    assert [m.role for m in c.messages] == ["user", "assistant", "tool", "assistant"]


def test_columns_fill_templates_and_map_labels(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text("sentence\tlabel\nfine film\t1\nbad\t0\n")
    sst = Columns("Review: {sentence}\nSentiment:", " {label}", {0: "negative", "1": "positive"})
    got = load_conversations(path, columns=sst)
    assert [c.messages for c in got] == [
        (U("Review: fine film\nSentiment:"), A(" positive")),
        (U("Review: bad\nSentiment:"), A(" negative")),
    ]
    assert [c.kind for c in got] == ["plain", "plain"]
    (c,) = load(tmp_path, {"a b": 1, "c": True, "d": "{c}"}, columns=Columns("{{x}} {a b} {d}", "{c}"))
    assert c.messages == (U("{x} 1 {c}"), A("true"))


@pytest.mark.parametrize(
    "columns,message",
    [
        (("{a", "{b}"), "columns: prompt: broken template"),
        (("{a.__class__}", "{b}"), "a.__class__: missing; the row has a, b"),
        (("{}", "{b}"), "only plain {column}"),
        (("{a!r}", "{b}"), "only plain {column}"),
        (("{a:>9}", "{b}"), "only plain {column}"),
        (("{a}", ""), "columns: completion: is empty"),
        (("{aa}", "{b}"), "aa: missing; the row has a, b; did you mean 'a'?"),
        (("{a}", "{b}", {}), "columns: labels:"),
        (("{a}", "{b}", {"0": ""}), "columns: labels:"),
        ((3, "{b}"), "columns: prompt: is a number"),
    ],
)
def test_broken_column_templates_are_one_line(tmp_path, columns, message):
    with pytest.raises(UserError) as e:
        load(tmp_path, {"a": "x", "b": "y"}, columns=Columns(*columns))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_options_are_checked(tmp_path):
    row = {"text": "a"}
    for options, message in [
        (
            {"format": "alpacca"},
            "format: unknown 'alpacca'; allowed: auto, messages, sharegpt, alpaca, prompt-completion, text; did you mean 'alpaca'?",
        ),
        ({"format": "text", "columns": Columns("{text}", "x")}, "exclude each other"),
        ({"max_rows": 0}, "max_rows: is 0"),
    ]:
        with pytest.raises(UserError) as e:
            load(tmp_path, row, **options)
        assert message in str(e.value)
    with pytest.raises(UserError, match="no file given"):
        load_conversations([])


def test_several_files_each_with_its_own_shape_and_max_rows_over_all(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.csv").write_text("prompt,completion\nc,d\ne,f\n")
    files = [tmp_path / "a.jsonl", str(tmp_path / "b.csv")]
    assert [c.kind for c in load_conversations(files)] == ["text", "text", "plain", "plain"]
    assert [c.reference for c in load_conversations(files, max_rows=3)] == ["a", "b", "d"]
    assert len(load_conversations(files, max_rows=1)) == 1


def test_rows_after_max_rows_are_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbroken\n')
    assert len(load_conversations(tmp_path / "a.jsonl", max_rows=1)) == 1


def test_real_files_of_every_shape():
    expected = {
        "alpaca_en_demo.json": ("alpaca", 999),
        "alpaca_zh_demo.json": ("alpaca", 1000),
        "c4_demo.jsonl": ("text", 300),
        "identity.json": ("alpaca", 91),
        "kto_en_demo.json": ("messages", 300),
        "v1_sft_demo.jsonl": ("messages", 500),
    }
    for name, (shape, n) in expected.items():
        got = collect(data_dir("chat-formats", name))
        assert (list(got.formats.values()), len(got.conversations), got.problems) == ([shape], n, [])
    calls = collect(data_dir("chat-formats", "glaive_toolcall_en_demo.json"))
    assert len(calls.conversations) + len(calls.problems) == 300 and {p.field for p in calls.problems} >= {"tools"}
    assert all("cannot be rendered" in p.reason for p in calls.problems)
    for name, reason in [
        ("v1_multimodal_demo.jsonl", "type 'image_url' is not text"),
        ("mllm_demo.json", "pictures"),
        ("dpo_en_demo.json", "preference pairs"),
        ("dataset_info.json", "fit no known shape"),
    ]:
        got = collect(data_dir("chat-formats", name))
        assert not got.conversations and reason in got.problems[0].reason

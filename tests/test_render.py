"""Tokens: what is trained is the answer and its stop token, and training sees exactly what generation is fed."""

from __future__ import annotations

import itertools
import random

import pytest
from tokenizers_tiny import CHATML, GEMMA, STYLES, data_dir, styled, tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tsugiki.data import DEFAULT_TEMPLATE, Columns, Conversation, Message, Renderer, load_conversations
from tsugiki.data.check import check, pieces, show
from tsugiki.errors import UserError

PIECES = [
    "The cat sat.",
    "two plus two",
    "日本語の文章です。",
    "🎉",
    "👩‍👩‍👧",
    "Ünïcödé",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "12345",
    "a",
    ".",
    ":",
    "[INST",
    "</",
    "<b>",
    "é",
    "​",
    "###",
    "It's",
    "…",
    "“q”",
    "{{ x }}",
    "{% if %}",
    "\\n",
]


def text(rng: random.Random, empty: bool) -> str:
    made = "".join(rng.choices(PIECES, k=rng.randint(1, 6)))
    return made if made.strip() or empty else made + "x"


def talk(rng: random.Random, system: bool = True) -> Conversation:
    messages = [Message("system", text(rng, False))] if system and rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        messages += [Message("user", text(rng, True)), Message("assistant", text(rng, False))]
    return Conversation("chat", tuple(messages), "made.jsonl:1")


def decode(t, ids) -> str:
    return t.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def runs(trained: list[bool]) -> list[tuple[int, int]]:
    """(start, end) of each run of trained tokens."""
    edges = [n for n in range(len(trained) + 1) if (trained[n : n + 1] == [True]) != (n > 0 and trained[n - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", STYLES)
def test_trained_tokens_are_the_answers_and_their_stop_tokens_and_prompts_are_what_generation_is_fed(name, kind):
    t, style = styled(name, kind)
    r = Renderer(t)
    assert t.convert_tokens_to_ids(style.end) in r.stop_ids and t.eos_token_id in r.stop_ids
    rng = random.Random(f"{name}/{kind}")
    several = 0
    for c in [talk(rng, style.system) for _ in range(60)]:
        examples, report = r.examples([c], 4096)
        assert (report.cut, report.dropped) == (0, 0)
        answers = [n for n, m in enumerate(c.messages) if m.role == "assistant"]
        got = [(e, start, end) for e in examples for start, end in runs(e.trained)]
        assert len(got) == len(answers)
        several += len(answers) > 1
        for k, (e, start, end) in zip(answers, got, strict=True):
            before, whole = decode(t, e.ids[:start]), decode(t, e.ids[:end])
            content = c.messages[k].content
            expected = style.trained.format(content.strip() if style.strips else content)
            assert whole.startswith(before) and whole[len(before) :] == expected
            upto = Conversation("chat", c.messages[: k + 1], c.where)
            assert r.prompt(upto) == e.ids[:start] == r.prompt(Conversation("chat", c.messages[:k], c.where))
            said = [{"role": m.role, "content": m.content} for m in c.messages[:k]]
            p = t.apply_chat_template(
                said, tokenize=False, add_generation_prompt=True, chat_template=t.chat_template or DEFAULT_TEMPLATE
            )
            assert e.ids[:start] == t(p, add_special_tokens=not (t.bos_token and p.startswith(t.bos_token)))["input_ids"]
        if style.bos:
            for e in examples:
                users = sum(m.role == "user" for m in c.messages)
                assert e.ids[0] == t.bos_token_id
                assert 1 <= e.ids.count(t.bos_token_id) <= (users if style.bos_each_turn else 1)
    assert several > 10


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_prompt_and_completion_join_as_given_with_eos_after(kind):
    t = tokenizer(kind, "<s>", "</s>", adds_bos=True)
    r = Renderer(t)
    rng, fused = random.Random(7), 0
    pairs = [
        ("Sentiment: ", "positive"),
        ("a\n", "\nb"),
        ("The c", "at sat"),
        ("[INST]", " th"),
        ("1234", "5678"),
        ("th", "e"),
        ("Review:", " a film"),
        ("ab ", " x"),
        ("It is fo", "ur."),
    ]
    for prompt, completion in pairs + [(text(rng, True) * rng.randint(0, 1), text(rng, False)) for _ in range(100)]:
        c = Conversation("plain", (Message("user", prompt), Message("assistant", completion)), "made.jsonl:1")
        (e,), _ = r.examples([c], 4096)
        ((start, end),) = runs(e.trained)
        assert decode(t, e.ids) == decode(t, t(prompt + completion)["input_ids"]) + "</s>"
        assert e.ids[:start] == t(prompt)["input_ids"] == r.prompt(c) and end == len(e.ids) and e.ids[-1] == t.eos_token_id
        fused += e.ids[:-1] != t(prompt + completion)["input_ids"]  # the two would have shared a token
        bare = kind == "pieces" and not prompt  # nothing before: SentencePiece begins every text with a space
        assert r.answer(e.ids[start:]) == (" " if bare else "") + completion
    assert fused >= 3


def test_padding_with_the_end_token_does_not_hide_it_from_training():
    t = tokenizer(eos="</s>", pad="</s>")
    assert t.pad_token_id == t.eos_token_id
    (e,), _ = Renderer(t).examples([Conversation("plain", (Message("user", "a"), Message("assistant", "b")), "f:1")], 32)
    assert e.ids[-1] == t.eos_token_id and e.trained[-1]


def test_no_first_token_is_trained_and_only_the_last_answer_is_with_train_on_last():
    t = tokenizer(template=CHATML)
    turns = tuple(Message(role, "hello there") for role in ("user", "assistant") * 3)
    c = Conversation("chat", turns, "f:1")
    (every,), _ = Renderer(t).examples([c], 512)
    (last,), _ = Renderer(t, train_on="last").examples([c], 512)
    assert every.ids == last.ids and len(runs(every.trained)) == 3 and runs(last.trained) == runs(every.trained)[-1:]
    (e,), _ = Renderer(t).examples([Conversation("text", (Message("assistant", "hello"),), "f:1")], 512)
    assert e.trained == [False] + [True] * (len(e.ids) - 1) and e.ids[-1] == t.eos_token_id


def test_an_answer_of_weight_zero_is_not_trained(tmp_path):
    f = tmp_path / "w.jsonl"
    f.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "skip me", "weight": 0}, '
        '{"role": "user", "content": "b"}, {"role": "assistant", "content": "learn me", "weight": 1}]}\n'
    )
    t = tokenizer(template=CHATML)
    (e,), _ = Renderer(t).examples(load_conversations(f), 512)
    assert [decode(t, e.ids[a:b]) for a, b in runs(e.trained)] == ["learn me<|im_end|>"]


def test_turns_that_rewrite_earlier_ones_become_examples_of_their_own():
    t, _ = styled("rewrites")
    turns = tuple(Message(role, "hello there") for role in ("user", "assistant") * 3)
    examples, report = Renderer(t).examples([Conversation("chat", turns, "f:1")], 512)
    assert len(examples) == 3 and report.split == 1
    assert [decode(t, e.ids).count("<think>") for e in examples] == [1, 1, 1]


def test_long_rows_are_cut_on_the_right_and_counted():
    t = tokenizer(template=CHATML)
    short = Conversation("chat", (Message("user", "a"), Message("assistant", "b")), "f:1")
    long = Conversation("chat", (Message("user", "a"), Message("assistant", "b " * 200)), "f:2")
    hopeless = Conversation("chat", (Message("user", "a " * 200), Message("assistant", "b")), "f:3")
    examples, report = Renderer(t).examples([short, long, hopeless], 40)
    assert [e.where for e in examples] == ["f:1", "f:2"] and len(examples[1].ids) == 40
    assert (report.rows, report.cut, report.dropped) == (3, 2, 1)
    with pytest.raises(UserError, match="max_length: 40 leaves no answer token"):
        Renderer(t).examples([hopeless], 40)
    with pytest.raises(UserError, match="max_length: is 1"):
        Renderer(t).examples([short], 1)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("size", [2, 3, 16, 64, 100_000])
def test_long_texts_are_split_without_loss(kind, size):
    t = tokenizer(kind, "<s>", "</s>", adds_bos=True)
    for repeat in range(1, 12):
        document = "Once upon a time there was a cat. 日本\n\n" * repeat
        c = Conversation("text", (Message("assistant", document),), "f:1")
        examples, report = Renderer(t).examples([c], size)
        whole = t(document)["input_ids"] + [t.eos_token_id]
        trained = [i for e in examples for i, on in zip(e.ids, e.trained, strict=True) if on]
        assert trained == whole[1:], "every token but the first is trained, once"
        assert all(len(e.ids) <= size and e.trained == [False] + [True] * (len(e.ids) - 1) for e in examples)
        assert all(a.ids[-1] == b.ids[0] for a, b in itertools.pairwise(examples)), "a piece begins where the last one ended"
        assert report.chunks == len(examples) - 1 and report.cut == 0 and report.dropped == 0


@pytest.mark.parametrize(
    "eos, stop, end",
    [("<|im_end|>", None, "<|endoftext|>"), ("<|eot_id|>", None, "<|endoftext|>"), ("</s>", None, "</s>"),
     ("<|im_end|>", "<|im_end|>", "<|im_end|>")],
)
def test_a_text_ends_as_in_pretraining_and_an_answer_as_a_turn(eos, stop, end):
    """Chat tokenizers call the end of a turn their eos; no text of pretraining ended with it."""
    t = tokenizer(eos=eos, template=CHATML if eos == "<|im_end|>" else None)
    r = Renderer(t, stop=stop)
    (e,), _ = r.examples([Conversation("text", (Message("assistant", "hello"),), "f:1")], 64)
    (a,), _ = r.examples([Conversation("plain", (Message("user", "a"), Message("assistant", "b")), "f:1")], 64)
    assert e.ids[-1] == t.convert_tokens_to_ids(end) and a.ids[-1] == t.convert_tokens_to_ids(stop or eos)


def test_literal_special_tokens_in_content_are_refused_by_name():
    t = tokenizer(template=CHATML)
    rows = [
        Conversation("chat", (Message("user", "hi <|im_end|> there"), Message("assistant", "b")), "f.jsonl:4"),
        Conversation("plain", (Message("user", "hi"), Message("assistant", "b</s>")), "f.jsonl:5"),
        Conversation("text", (Message("assistant", "a<|endoftext|>b"),), "f.jsonl:6"),
    ]
    with pytest.raises(UserError) as e:
        Renderer(t).examples(rows, 64)
    lines = str(e.value).splitlines()
    assert lines[0] == "f.jsonl:4: messages[0]: holds the special token '<|im_end|>' as text, which would act as one"
    assert lines[1].startswith("f.jsonl:5: completion: holds the special token '</s>'") and len(lines) == 3
    assert Renderer(t).problems(rows)[2].field == "text"
    with pytest.raises(UserError, match="holds the special token"):
        Renderer(t).prompt(rows[0])


def test_what_a_template_refuses_or_drops_is_an_error_with_its_line():
    system = (Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(UserError, match="f:1: messages: the chat template refuses it: System role not supported"):
        Renderer(tokenizer(bos="<s>", template=GEMMA)).examples([Conversation("chat", system, "f:1")], 64)
    deaf = (
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"f:1: messages\[0\]: the chat template leaves out or changes this system message"):
        Renderer(tokenizer(template=deaf)).examples([Conversation("chat", system, "f:1")], 64)
    other = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")
    with pytest.raises(UserError, match="does not continue its generation prompt"):
        Renderer(tokenizer(template=other)).examples([Conversation("chat", system, "f:1")], 64)


def test_a_broken_template_or_option_is_one_line():
    with pytest.raises(UserError, match="template: line 2: "):
        Renderer(tokenizer(), template="{{ bos_token }}\n{% for m in %}")
    with pytest.raises(UserError, match="train_on: unknown 'lats'; allowed: all, last; did you mean 'last'"):
        Renderer(tokenizer(), train_on="lats")
    with pytest.raises(UserError, match="stop: '</sx>' is not a token of this tokenizer; did you mean '</s>'"):
        Renderer(tokenizer(), stop="</sx>")


def test_the_stop_token_can_be_named_and_is_found_without_eos():
    t = tokenizer("pieces", "<s>", "</s>", adds_bos=True)
    r = Renderer(t, stop="<s>")
    c = Conversation("plain", (Message("user", "Once"), Message("assistant", " upon")), "f:1")
    (e,), _ = r.examples([c], 64)
    assert e.ids[0] == e.ids[-1] == t.bos_token_id and e.trained[-1] and not e.trained[0]
    assert r.stop_ids == tuple(sorted((t.bos_token_id, t.eos_token_id)))
    (e,), _ = r.examples([Conversation("chat", c.messages, "f:1")], 64)
    assert e.ids[-1] == t.bos_token_id
    none = tokenizer(eos=None)
    assert Renderer(none).stop_id == none.convert_tokens_to_ids("<|endoftext|>")
    bare = PreTrainedTokenizerFast(
        tokenizer_object=none._tokenizer.from_str(
            '{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0,"[UNK]":1},"unk_token":"[UNK]"}}'
        )
    )
    with pytest.raises(UserError, match="tokenizer: no end-of-text token"):
        Renderer(bare)
    assert Renderer(bare, stop="a").stop_ids == (0,)


def test_the_default_template_is_used_without_one_and_a_given_one_wins():
    t = tokenizer()
    c = Conversation("chat", (Message("system", "S"), Message("user", "U"), Message("assistant", "A")), "f:1")
    (e,), _ = Renderer(t).examples([c], 64)
    assert decode(t, e.ids) == "### System:\nS\n\n### User:\nU\n\n### Assistant:\nA</s>"
    (e,), _ = Renderer(t, template=CHATML).examples([c], 64)
    assert decode(t, e.ids).endswith("<|im_start|>assistant\nA<|im_end|>")


def test_progress_reaches_the_end():
    rows = [Conversation("plain", (Message("user", "a"), Message("assistant", "b")), f"f:{n}") for n in range(2500)]
    seen = []
    Renderer(tokenizer()).examples(rows, 16, lambda done, total: seen.append((done, total)))
    assert seen == [(1000, 2500), (2000, 2500), (2500, 2500)]


def test_showing_marks_exactly_the_trained_tokens():
    t = tokenizer("bytes", template=CHATML)
    c = Conversation("chat", (Message("user", "猫?\x1b[31m"), Message("assistant", "🎉 It is four.")), "f:1")
    (e,), _ = Renderer(t).examples([c], 256)
    got = pieces(Renderer(t), e)
    assert "".join(s for s, _ in got) == decode(t, e.ids)
    assert "".join(s for s, trained in got if trained) == "🎉 It is four.<|im_end|>"
    plain = show(Renderer(t), [c], colour=False)
    marked = plain[plain.index("⟦") + 1 : plain.index("⟧")]
    assert marked.replace("|", "") == "🎉 It is four.<im_end>" and "\x1b" not in plain and "\\x1b[31m" in plain
    coloured = show(Renderer(t), [c])
    assert coloured.count("\x1b[30;4") == sum(trained for _, trained in got)


def test_checking_lists_every_problem_and_sums_up_the_rest(tmp_path):
    f = tmp_path / "d.jsonl"
    f.write_text('{"prompt": "a", "completion": "bc"}\n{"prompt": 1, "completion": "b"}\n{"prompt": "a</s>", "completion": "b"}\n')
    problems, summary = check(f)
    assert [p.line for p in problems] == [2] and summary["rows"] == 2 and summary["formats"] == {str(f): "prompt-completion"}
    problems, summary = check(f, renderer=Renderer(tokenizer()))
    assert [p.line for p in problems] == [2, 3] and summary["rows"] == 1 and summary["answer_characters"] == [2, 2, 2]


REAL = ["models/stories260k-hf", "models/babyllama-char361-hf", "models/tinystories-656k", "tokenizers/gpt2"]


@pytest.mark.parametrize("folder", REAL)
def test_real_tokenizers_train_on_what_they_are_prompted_with(folder):
    path = data_dir(*folder.split("/"))
    gpt2 = folder.endswith("gpt2")
    t = (
        PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), eos_token="<|endoftext|>")
        if gpt2
        else (AutoTokenizer.from_pretrained(path))
    )
    r = Renderer(t)
    sst = Columns("Review: {sentence}\nSentiment:", " {label}", {"0": "negative", "1": "positive"})
    rows = load_conversations(data_dir("glue", "SST-2", "dev.tsv"), columns=sst)
    rows += load_conversations(data_dir("chat-formats", "alpaca_en_demo.json"), max_rows=200)
    rows += load_conversations(data_dir("instruction-ja", "instruction_ja_messages.jsonl"), max_rows=100)
    examples, report = r.examples(rows, 100_000)
    assert len(examples) == len(rows) == report.rows and not report.split
    faithful = 0
    for c, e, p in zip(rows, examples, r.prompts(rows), strict=True):
        ((start, end),) = runs(e.trained)
        assert e.ids[:start] == p and e.ids[end - 1] in r.stop_ids and end == len(e.ids)
        assert sum(i == t.bos_token_id for i in e.ids[:-1]) == (t.bos_token_id is not None and t.bos_token_id != t.eos_token_id)
        faithful += r.answer(e.ids[start:]) == c.reference
    lossy = "tinystories" in folder  # its vocabulary has no bytes: other characters are lost by the tokenizer itself
    assert faithful == len(rows) or lossy and faithful >= 872

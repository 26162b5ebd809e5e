"""Contamination is counted: what training holds of the test, word for word and nearly, and nothing that it does not."""
import pytest
from tokenizers_tiny import data_dir

from tsugiki.data import Conversation, Message, load_conversations
from tsugiki.evaluate.overlap import overlap
from tsugiki.evaluate.score import Item
from tsugiki.evaluate.tasks import load

STORY = "On Monday the baker sold {} loaves of bread and on Tuesday {} more than that; how many loaves did she sell in all?"


def asked(text: str, n: int) -> Item:
    return Item(Conversation("plain", (Message("user", f"Please answer the question: {text}"), Message("assistant", "1")),
                             f"test.json:{n}"), "1", question=f"Please answer the question: {text}")


def trained(text: str, n: int) -> Conversation:
    return Conversation("chat", (Message("user", text), Message("assistant", "So it is.")), f"train.jsonl:{n}")


def test_rows_are_found_through_case_punctuation_and_small_changes_and_others_are_not():
    fresh = ["What weighs a pound of feathers on the moon?", "Who wrote the longest letter of that year, and to whom was it sent?",
             "Is salt water heavier than fresh water in a cold glass?", "How far is the sea from the old mill by the road?"]
    items = [asked(t, n) for n, t in enumerate([STORY.format(12, 5), "Which planet has the most moons of all?", *fresh, "Why?"])]
    train = [trained("Tell me a story about a baker who sold bread and cake on Monday and on Tuesday.", 1),
             trained(STORY.format(17, 9), 2),                                           # other numbers: nearly
             trained("please answer the question:  WHICH planet has the most moons, of all", 3),
             trained("How far is the town from the new mill by the river?", 4)]
    found = overlap(train, items)
    assert (found.exact, found.near, found.n) == (1, 1, 7) and found
    assert found.pairs == ("test.json:1 = train.jsonl:3", "test.json:0 ~ train.jsonl:2")
    assert str(found).startswith("1 of 7 test questions are in the training data word for word, 1 more nearly: test.json:1 = ")
    assert not overlap(train[:1] + train[3:], items) and overlap([], items).plain()["exact"] == 0


def test_a_task_in_its_own_wording_is_found_in_training_rows_of_another():
    messages = Message("user", "a moving and funny film \nThis was"), Message("assistant", " good")
    item = Item(Conversation("plain", messages, "dev.tsv:2"), "good", question="a moving and funny film")
    assert overlap([trained("Review: A moving and funny film. Sentiment:", 5)], [item]).exact == 1


def test_of_real_data_no_row_of_gsm8ks_training_is_in_its_test_and_a_test_set_is_all_of_itself():
    folder = data_dir("llm-adapters", "dataset")
    task, same = load("AddSub", folder, 60), load("AddSub", folder)
    assert overlap(same.conversations, task.items).exact == 60
    gsm8k = load_conversations([data_dir("gsm8k", "gsm8k_train_alpaca.jsonl")])
    assert overlap(gsm8k, load("gsm8k", data_dir("gsm8k")).items).exact == 0
    mawps = overlap(load("MultiArith", folder).conversations, load("mawps", folder).items)
    assert mawps.exact + mawps.near > 20, "the paper's own leak: mawps holds MultiArith"


@pytest.mark.parametrize("text", ["", "!!!", "one"])
def test_texts_without_words_to_compare_are_no_error(text):
    assert overlap([trained("something else", 1)], [asked(text, 0)]).n == 1

"""What is taken for the answer: right on hostile answers, and every disagreement with LLM-Adapters' own rules is listed."""
import importlib.util
from pathlib import Path

import pytest

from tsugiki.evaluate.extract import choice, number

LETTERS, TRUTH = tuple("ABCDE"), ("true", "false")
ANSWERS, OPTIONS, SOLUTIONS = ("answer1", "answer2", "answer3", "answer4"), ("option1", "option2"), ("solution1", "solution2")
# A name of LLM-Adapters whose rule is for these choices.
TASK = {LETTERS: "AQuA", TRUTH: "boolq", ANSWERS: "ARC-Easy", OPTIONS: "winogrande", SOLUTIONS: "piqa"}

# (what a model says, the choices, the answer in it)
AGREED = [
    ("A", LETTERS, "A"), ("C.", LETTERS, "C"), ("B) 27", LETTERS, "B"), ("true", TRUTH, "true"), ("", LETTERS, None),
    ("the correct answer is true", TRUTH, "true"), ("the correct answer is answer3", ANSWERS, "answer3"),
    ("false. The statement is true only if it rains", TRUTH, "false"), ("nothing of the kind", TRUTH, None),
    ("answer1", ANSWERS, "answer1"), ("the correct answer is option2", OPTIONS, "option2"), ("solution1.", SOLUTIONS, "solution1"),
    ("solution2 is better than solution1", SOLUTIONS, "solution2"), ("the correct answer is true\n\n### false", TRUTH, "true"),
    ("B. Because C is wrong", LETTERS, "B"), ("option1\noption1\noption1", OPTIONS, "option1"), ("(E)", LETTERS, "E"),
]
DISAGREED = [
    ("The answer is not A but B", LETTERS, "B"), ("A. no wait, B", LETTERS, "B"), ("The answer isn't A, it's C", LETTERS, "C"),
    ("Neither A nor B, so C", LETTERS, "C"), ("I don't think it is A. It is D.", LETTERS, "D"), ("(c)", LETTERS, "C"),
    ("BECAUSE of that: D", LETTERS, "D"), ("A man walks into a BAR", LETTERS, None), ("Definitely not", LETTERS, None),
    ("Option A is incorrect. Option B is correct.", LETTERS, "B"), ("A and B are too small: \\boxed{C}", LETTERS, "C"),
    ("The answer is either A or B.", LETTERS, None), ("A) 38 seems off, B) 27 fits. So B.", LETTERS, "B"),
    ("The answer is A. Wait, actually, no: E.", LETTERS, "E"), ("A dog has four legs, so the answer is C", LETTERS, "C"),
    ("Both A and B are wrong, C.", LETTERS, "C"), ("The answer is A or maybe B. Final answer: B", LETTERS, "B"),
    ("It is not true", TRUTH, "false"), ("True", TRUTH, "true"), ("FALSE!", TRUTH, "false"), ("The untrue claim", TRUTH, None),
    ("True or false?", TRUTH, None), ("It isn't false", TRUTH, "true"), ("true or false? false", TRUTH, "false"),
    ("Is it true? No, it is false.", TRUTH, "false"), ("The correct answer is 3.", ANSWERS, "answer3"), ("2", ANSWERS, "answer2"),
    ("Answer 2", ANSWERS, "answer2"), ("answer10", ANSWERS, None), ("answer1 or answer2", ANSWERS, None),
    ("answer1 is plausible, but answer2 fits better", ANSWERS, "answer2"), ("Not answer1: answer4", ANSWERS, "answer4"),
    ("the correct answer is option 1", OPTIONS, "option1"), ("rather than option1, option2", OPTIONS, "option2"),
    ("the correct answer is Option2", OPTIONS, "option2"), ("solution1 is wrong", SOLUTIONS, "solution2"),
]
NUMBERS_AGREED = [
    ("The answer is 4.", 4), ("The answer is 1,234.", 1234), ("The answer is -15.0", -15), ("9.8", 9.8), ("#### 42", 42),
    ("-3", -3),
    ("There were 7 - 3 = 4 crayons. The answer is 4.", 4), ("none at all", None), ("", None), ("first 3, then 4", 4),
    ("$1,234.50.", 1234.5), ("50%", 50), ("about 2,000,000 people", 2e6), ("So 5*2=10", 10), ("42km", 42), ("9" * 400, None),
    ("The answer is not 5 but 7", 7), ("5. no wait, 6", 6), ("The answer is: 18 dollars", 18), ("x = -4", -4), ("0", 0),
]
NUMBERS_DISAGREED = [
    ("The answer is 42 km/h (about 26 mph)", 42), ("The answer is 5 because there are 3 dogs", 5), ("10-3", 3), ("\u22125", -5),
    ("3/4", 0.75), ("The answer is 3/4 of a pie", 0.75), ("\\boxed{\\frac{3}{4}}", 0.75), ("1e3", 1000), (".5", 0.5),
    ("answer3 and x2", None), ("It is CO2", None), ("The answer is 3 + 4 = 7 apples for 2 kids", 7),
    ("The answer is $-5 for 2", -5),
    ("The answer is 7.\n\n### Instruction:\nAdd 99", 7), ("#### 42\nThat took 3 steps", 42), ("7, not 8", 7),
    ("The answer is 60 (=30+30).", 60), ("1,2,3", 3),
]


@pytest.fixture(scope="module")
def paper():
    """The paper's rules, a plain oracle."""
    spec = importlib.util.spec_from_file_location("check_tasks", Path(__file__).parents[1] / "scripts" / "check_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.paper_extract


@pytest.mark.parametrize(("said", "choices", "right"), AGREED + DISAGREED, ids=lambda v: str(v)[:40])
def test_the_choice_in_an_answer_is_found(said, choices, right):
    assert choice(said, choices) == right


@pytest.mark.parametrize(("said", "right"), NUMBERS_AGREED + NUMBERS_DISAGREED, ids=lambda v: str(v)[:40])
def test_the_number_in_an_answer_is_found(said, right):
    assert number(said) == right


def test_the_papers_rules_agree_where_they_are_right_and_every_disagreement_is_listed(paper):
    """Ours is right on both lists (above), so wherever the two differ the paper's is wrong."""
    for said, choices, right in AGREED + DISAGREED:
        assert ((paper(TASK[choices], said) or None) == right) == ((said, choices, right) in AGREED), said
    for said, right in NUMBERS_AGREED + NUMBERS_DISAGREED:
        got = paper("AddSub", said)
        got = None if got == float("inf") else got
        assert (got == right) == ((said, right) in NUMBERS_AGREED), (said, got)
    assert len(DISAGREED) > 30 and len(NUMBERS_DISAGREED) > 15


def test_choices_that_are_words_or_hold_each_other():
    assert choice("very bad", ("bad", "very bad")) == "very bad" and choice("bad.", ("bad", "very bad")) == "bad"
    assert choice("It was good, not bad at all", ("good", "bad")) == "good"
    assert choice("badly made", ("good", "bad")) is None
    assert choice("C++", ("C", "C++")) in ("C", "C++", None)            # no crash on signs of a pattern
    assert choice("anything", ()) is None


@pytest.mark.parametrize("said", ["A" * 20_000, "not " * 5_000 + "B", "1," * 20_000, "the answer is " * 3_000, "0" * 20_000,
                                  "(" * 10_000, "A or " * 5_000, "3/" * 10_000])
def test_long_rambling_takes_no_time(said):
    import time
    began = time.monotonic()
    choice(said, LETTERS)
    choice(said, ANSWERS)
    number(said)
    assert time.monotonic() - began < 5

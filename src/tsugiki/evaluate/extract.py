"""The answer in what a model says: a number, or one of some choices, through negations, corrections and talk around it."""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

# What announces the answer; the last one counts. What takes back all that was said before.
ANNOUNCED = re.compile(r"####|\\boxed\{|\banswers?\b\s*(?:is|are|was|would be|must be|should be|to be|will be|=|:)+|"
                       r"\b(?:correct|right|best)\s+(?:answer|option|choice|one)\b\s*(?:is|=|:)*|"
                       r"\b(?:i|we|i'll|i'd)\s+(?:choose|pick|select|go with|say)\b|\b(?:choice|option)\s*(?:is|=|:)", re.I)
TAKEN_BACK = re.compile(r"\b(?:no,?\s*wait|oh\s+wait|wait,|scratch that|correction:|i\s+meant?|sorry,|on second thought|"
                        r"no,\s+actually|actually,\s+no)\b", re.I)
NEAR, SAID, LAST = 60, 400, 50                        # characters beside a choice, of an announced answer; announcements
SENTENCE = re.compile(r"[.!?](?=\s+\S|\s*$)|\n\s*\n|\n(?=\S)|;")          # "4.5" goes on, "4. Then" does not
# Right before a choice, or right after it: it is ruled out.
NOT_BEFORE = re.compile(r"(?:\bnot|n't|n\u2019t|\bnever|\bneither|\bnor|\bthan|\binstead of|\bcannot be|\bexcept|\bnot\s+be)"
                        r"(?:\s+(?:the|an?|option|answer|choice|be|simply|just|either))*\s*[\"'(*]*$", re.I)
NOT_AFTER = re.compile(r"[\"')*]*\s*(?:is|are|was|would be|seems|must be)\s+(?:clearly |definitely |probably )?"
                       r"(?:not\b(?!\s+only)|n't|wrong|incorrect|false|untrue|impossible|ruled out)|"
                       r"[\"')*]*\s*(?:isn't|isn\u2019t|can't be|cannot be|wasn't)", re.I)
# An answer of its own.
ALONE = re.compile(r"[\"')*]*\s*(?:[.!:;\n\u2013\u2014]|-\s|,\s*(?!or\b|and\b)|because\b|since\b|\(|$)", re.I)
OR = re.compile(r"[\"')*]*\s*(?:,\s*)?(?:or|/|and)\s*[\"'(*]*(?:the |option |answer )?$", re.I)
NUMBER = re.compile(r"(?<![\w./])(?P<sign>[-\u2212+]\s?)?[$\u20ac\u00a3\u00a5]?\s?(?P<sign2>[-\u2212])?"
                    r"(?P<whole>\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)?(?P<part>\.\d+)?(?P<power>[eE][-+]?\d+)?"
                    r"(?:\s*/\s*(?P<under>[1-9]\d*)(?![\d/.]))?")
SUM = re.compile(r"\d\s*[-+*/\u00d7\u00f7^x]\s*\S")
LATEX = re.compile(r"\\d?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}")


def number(text: str) -> float | None:
    """The number that a text gives as its answer, or None where there is none.

    After the last announcement ("the answer is", "####", ...) the first number of that sentence, or what its last "=" comes to;
    without one the last number of all. What is taken back ("no, wait") and what is ruled out ("not 5") does not count.
    Signs, thousands, decimals, powers of ten, fractions and money are read; digits inside words are not numbers.
    """
    text = _standing(LATEX.sub(r"\1/\2", text), lambda t: bool(_numbers(t)))
    for marker in reversed(list(ANNOUNCED.finditer(text))[-LAST:]):
        sentence = _sentence(text, marker.end())
        if said := _numbers(sentence):
            equals = sentence.rfind("=")
            sums = [v for at, v in said if at > equals] if SUM.search(sentence[said[0][0]:max(equals, 0)]) else []
            return (sums or [said[0][1]])[0]
    said = _numbers(text)
    return said[-1][1] if said else None


def _numbers(text: str) -> list[tuple[int, float]]:
    """(place, value) of every number that is not ruled out."""
    found = []
    for m in NUMBER.finditer(text):
        if not (m["whole"] or m["part"]):
            continue
        if NOT_BEFORE.search(text[max(0, m.start() - NEAR):m.start()]) and not m["sign"]:
            continue
        digits = (m["whole"] or "0").replace(",", "") + (m["part"] or "") + (m["power"] or "")
        try:
            value = float(Fraction(digits) / Fraction(m["under"]) if m["under"] else float(digits))
        except (OverflowError, ValueError):
            continue
        if math.isinf(value):
            continue
        minus = any(s and s.strip() in "-\u2212" for s in (m["sign"], m["sign2"]))
        found.append((m.start(), -value if minus else value))
    return found


def choice(text: str, choices: Sequence[str]) -> str | None:
    """The one of the choices that a text gives as its answer, or None where it gives none, or leaves several open.

    In this order: what follows the last announcement; the text's first words; the only choice that is named; the only one left
    where all others are ruled out; the last one named, unless it stands beside another ("A or B"). Choices are whole words; a
    word's case does not matter, a letter's does.
    """
    text = _standing(text, lambda t: any(not m.out for m in _mentions(t, choices)))
    for marker in reversed(list(ANNOUNCED.finditer(text))[-LAST:]):
        sentence = _sentence(text, marker.end())
        said = _mentions(sentence, choices, bare=True)
        if (got := _settled(sentence, said, choices, first=True)) is not None:
            return got
    said = _mentions(text, choices, bare=not re.search(r"\w\s+\w", text.strip()))
    if said and not said[0].out and not re.search(r"\w", text[:said[0].start]) and ALONE.match(text[said[0].end:]):
        return said[0].choice
    return _settled(text, said, choices, first=False)


class _Mention:
    def __init__(self, choice: str, start: int, end: int, out: bool):
        self.choice, self.start, self.end, self.out = choice, start, end, out


def _settled(text: str, said: Sequence[_Mention], choices: Sequence[str], first: bool) -> str | None:
    """What a passage comes down to: its first (or last) choice that is not ruled out and stands for itself."""
    kept = [m for m in said if not m.out]
    if not kept:
        left = [c for c in choices if c not in {m.choice for m in said}]
        return left[0] if said and len(left) == 1 else None
    if len({m.choice for m in kept}) == 1:
        return kept[0].choice
    at = 0 if first else len(kept) - 1
    other = kept[1 if first else at - 1]
    a, b = sorted((kept[at], other), key=lambda m: m.start)
    return None if a.choice != b.choice and OR.search(text[a.end:b.start]) else kept[at].choice


def _mentions(text: str, choices: Sequence[str], bare: bool = False) -> list[_Mention]:
    """Where choices are named, in order. `bare`: a number alone stands for the choice that ends with it ("3": answer3)."""
    spans = [(m.start(), -m.end(), c) for c in choices for m in _pattern(c, bare).finditer(text)
             if not (len(c) == 1 and _article(text, m))]
    found, over = [], 0
    for start, end, c in sorted(spans):
        if start >= over:                             # a longer choice that begins here or before covers it
            over = -end
            out = NOT_BEFORE.search(text[max(0, start - NEAR):start]) or NOT_AFTER.match(text[over:over + NEAR])
            found.append(_Mention(c, start, over, bool(out)))
    return found


def _pattern(c: str, bare: bool) -> re.Pattern:
    if len(c) == 1 and c.isalpha():
        return re.compile(rf"(?<![\w'\u2019-]){c}(?![\w'\u2019])(?!-\w)|(?<=\(){c.lower()}(?=\))|(?<!\S){c.lower()}(?=\)(?:\s|$))")
    parts = re.fullmatch(r"(.*?[^\W\d])\s*(\d+)", c)
    if not parts:
        return re.compile(rf"(?<!\w){re.escape(c)}(?!\w)", re.I)
    word, digits = re.escape(parts[1]), parts[2]
    alone = rf"|(?<![\w.,/-]){digits}(?![\w/]|[.,]\d)" if bare else ""
    return re.compile(rf"(?<!\w){word}[\s_-]?{digits}(?!\w){alone}", re.I)


def _article(text: str, m: re.Match) -> bool:
    """Whether an "A" or "I" is the word and no choice: a lowercase word follows, which no verb of an answer is."""
    after = text[m.end():m.end() + NEAR]
    return m.group() in "AI" and bool(re.match(r"\s+(?!is\b|was\b|because\b|since\b|and\b|or\b|but\b|not\b|nor\b|as\b|would\b|"
                                               r"seems\b|for\b|in\b|then\b|if\b|which\b|rather\b|instead\b|fits\b)[a-z]", after))


def _standing(text: str, says: Callable[[str], bool]) -> str:
    """What is left after the last time that the speaker took back what was said, if it says anything."""
    for m in reversed(list(TAKEN_BACK.finditer(text))[-LAST:]):
        if says(text[m.end():]):
            return text[m.end():]
    return text


def _sentence(text: str, start: int) -> str:
    """Up to the end of the sentence that begins at `start`."""
    text = text[start:start + SAID]
    start = len(text) - len(text.lstrip(" \t\n:*\"'"))
    end = SENTENCE.search(text, start)
    return text[:end.start()] if end and end.start() > start else text

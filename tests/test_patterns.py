"""Regular expressions from files: the answers of `re`, and an end to every match."""
import random
import re
import time
import warnings

import pytest

from tsugiki import patterns
from tsugiki.errors import UserError

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "h.0.c_attn", "a", "", "aab_a.b1", "a\n"]
USUAL = [r".*\.(0|1)\..*(q_proj|v_proj)", r"^(?!.*lm_head).*proj", r"model\.layers\.\d+\.mlp\..+", r".*[^.]+$", r"(?:.*\.)?q_proj",
         r"\.1\..*(down|fc2)", r"[a-q]_?\w{2,5}", r"(?<=mlp\.)down_proj", r"\bq_proj\b", r"(|a)*b?", r"a{2}b_.*?", r"\W|\D\S",
         r"h\.[0-9]\.", r"^(a|lm_head|h\.0\.c_attn)$", "q_proj"]
BOMBS = [r"(.+)+_never", r"((.*)*)*x", "(a|a)*" * 20 + "x", ".*" * 40 + "x", "(m|m)(o|o)(d|d)(e|e)(l|l)" + "(.|.)" * 40 + "x",
         "(((((.?){30}){30}){30}){30}){30}x", r"(.*)\1x", "(.?)" * 30 + "x{30}", "a" * 70000, "(" * 900 + ")" * 900, "(?i)a", "(a",
         "[[a]", r"x{99999}{99999}", r"(?>a)"]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_match_as_re_matches(pattern):
    for name in NAMES:
        assert patterns.fullmatch(pattern, name) == bool(re.fullmatch(pattern, name)), name
        assert patterns.search(pattern, name) == bool(re.search(pattern, name)), name


def test_random_patterns_match_as_re_matches():
    draw, atoms = random.Random(0), ["a", "b", ".", r"\.", "[ab]", "[^a_]", r"\w", r"\d", "_", "^", "$", r"\b", "1"]

    def make(depth):
        if depth == 0 or draw.random() < 0.3:
            return draw.choice(atoms)
        kind = draw.choice(["seq", "seq", "or", "repeat", "see"])
        if kind == "repeat":
            return f"(?:{make(depth - 1)})" + draw.choice(["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}?"])
        parts = [make(depth - 1) for _ in range(draw.randint(2, 3))]
        mark = f"?{draw.choice(':!=')}" if kind == "see" else ""
        return "".join(parts) if kind == "seq" else f"({mark}{'|'.join(parts)})"
    hits = 0
    for _ in range(3000):
        pattern, name = make(4), "".join(draw.choice("ab_.1") for _ in range(draw.randint(0, 7)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = bool(re.fullmatch(pattern, name)), bool(re.search(pattern, name))
        hits += expected[0]
        assert (patterns.fullmatch(pattern, name), patterns.search(pattern, name)) == expected, (pattern, name)
    assert hits > 100


@pytest.mark.parametrize("pattern", BOMBS, ids=range(len(BOMBS)))
def test_every_match_ends_soon_or_is_refused_in_one_line(pattern):
    start = time.process_time()
    for name in NAMES:
        for match in (patterns.fullmatch, patterns.search):
            try:
                assert match(pattern, name) in (True, False)
            except UserError as e:
                assert "\n" not in str(e) and len(str(e)) < 200
    assert time.process_time() - start < 5

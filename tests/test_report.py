"""The report is one self-contained, escaped, readable page whatever is in the run or missing from it."""
from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser

import pytest

from tsugiki.train.chart import HEIGHT, MOST_POINTS, WIDTH, chart, nice_ticks
from tsugiki.train.report import STYLE, write_report

HOSTILE = "</title></script><script>alert(1)</script><img src=x onerror='alert(2)'>"
HOSTILE += "\"{{ 7 * 7 }}{% raw %}&lt;\x00\x1b\ud800"
VOID = {"meta", "link", "br", "img", "input"}
FULL = {
    "title": "A run", "summary": {"method": "lora", "steps": 1200, "tokens/s": 8120.44, "resumed": False},
    "config": {"base": "embedded", "train": {"lr": 2e-4, "seed": 0, "stop": None}, "data": ["a.jsonl", "b.jsonl"]},
    "curves": {"train loss": [(1, 4.0), (2, 3.0), (3, 2.5)], "held-out loss": [(1, 4.1), (3, 2.6)],
               "learning rate": [(1, 1e-4), (2, 2e-4), (3, 0.0)], "exact match": [(1, 0.1), (3, 0.9)]},
    "parameters": {"total": 7421952, "trainable": 221184, "share": 0.0298,
                   "rows": [{"site": "layers.0.q", "count": 4096}]},
    "samples": [{"prompt": "two plus two equals", "expected": " four", "before": " men", "after": " four"}],
    "before_after": {"exact match": {"before": 0.0, "after": 0.95, "n": 160, "interval": [0.905, 0.975]},
                     "loss": {"before": 4.0, "after": 0.4, "n": 160, "interval": None}},
    "environment": {"python": "3.11", "torch": {"version": "2.13"}},
}


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.open, self.words = text, [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def page(tmp_path, run) -> Page:
    write_report(tmp_path / "report.html", run)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def coordinates(made: Page) -> list[float]:
    texts = [attrs["d"] for attrs in made.all("path")]
    texts += [f"{attrs['cx']} {attrs['cy']}" for attrs in made.all("circle")]
    assert all(re.fullmatch(r"[ML0-9. ]+", text) for text in texts), texts
    return [float(number) for text in texts for number in re.findall(r"[0-9.]+", text)]


def test_page_says_what_the_run_says(tmp_path):
    made = page(tmp_path, FULL)
    text = " ".join(" ".join(made.words).split())
    for said in ("A run", "1,200", "8,120", "train.lr", "0.0002", '["a.jsonl", "b.jsonl"]', "221,184", "7,421,952",
                 "2.98 %", "layers.0.q", "4,096", "two plus two equals", "✓ as expected", "✗ differs",
                 "0.905 to 0.975", "+0.950", "−3.600",
                 "torch.version", "Learning rate", "from 4 at step 1 to 2.5 at step 3"):
        assert said in text, said
    assert len(made.all("figure")) == 3                                        # both losses share one
    assert len({attrs["class"] for attrs in made.all("g")}) == 2


def test_nothing_is_loaded_from_anywhere_and_nothing_runs(tmp_path):
    made = page(tmp_path, FULL)
    assert not re.search(r"https?:|//|@import|url\(", made.text.replace("<!doctype", ""))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in made.tags}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in made.tags for name in attrs)
    assert any("default-src 'none'" in attrs.get("content", "") for attrs in made.all("meta"))


def test_hostile_text_in_every_place_is_shown_and_never_markup(tmp_path):
    run = {
        "title": HOSTILE, "summary": {HOSTILE: HOSTILE}, "config": {HOSTILE: {HOSTILE: [HOSTILE]}, 3: {"a": {HOSTILE}}},
        "curves": {HOSTILE: [(1, 2.0), (2, 3.0)], "train loss": [(HOSTILE, HOSTILE), (1, HOSTILE)]},
        "parameters": {"total": HOSTILE, "trainable": HOSTILE, "share": HOSTILE,
                       "rows": [{"site": HOSTILE, "count": HOSTILE}]},
        "samples": [dict.fromkeys(("prompt", "expected", "before", "after"), HOSTILE)],
        "before_after": {HOSTILE: {"before": HOSTILE, "after": HOSTILE, "n": HOSTILE, "interval": [HOSTILE, 1]}},
        "environment": {HOSTILE: HOSTILE},
    }
    made = page(tmp_path, run)
    assert not {"script", "img"} & {tag for tag, _ in made.tags}
    assert made.text.count("<title>") == 1 and "49" not in "".join(made.all("figure")[0])
    assert "{{ 7 * 7 }}" in "".join(made.words) and "alert(1)" in "".join(made.words)
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", made.text)


@pytest.mark.parametrize("left_out", [*FULL, "all", "values"])
def test_any_part_may_be_missing_or_empty(tmp_path, left_out):
    if left_out == "all":
        runs = [{}]
    elif left_out == "values":
        runs = [{"samples": [{}], "before_after": {"m": {}, "n": None},
                 "parameters": {"rows": [{}]}, "curves": {"x": []}},
                {"summary": {"a": None}, "config": {"a": None, "b": {}}, "curves": {"x": None},
                 "samples": [{"after": ""}]}]
    else:
        runs = [{key: part for key, part in FULL.items() if key != left_out}, FULL | {left_out: None},
                FULL | {left_out: type(FULL[left_out])()}]
    for run in runs:
        made = page(tmp_path, run)
        assert len(made.all("h1")) == 1
        assert "None" not in "".join(made.words) and "Undefined" not in made.text


def test_values_that_are_not_finite_leave_a_gap_and_are_named(tmp_path):
    losses = [(step, 3.0 - step / 10) for step in range(10)]
    losses[4], losses[5], losses[8] = (4, math.nan), (5, math.inf), (8, None)
    made = page(tmp_path, {"curves": {"train loss": losses, "held-out loss": [(0, math.nan)]},
                           "before_after": {"m": {"before": math.nan, "after": 1.0, "interval": [math.nan, 1.0]}}})
    assert all(0 <= number <= max(WIDTH, HEIGHT) for number in coordinates(made))
    drawn = [attrs["d"] for attrs in made.all("path")]
    assert len(drawn) == 1 and drawn[0].count("M") == 2                        # 0-3, 6-7; step 9 stands alone, as a dot
    assert len(made.all("circle")) == 7
    text = " ".join(made.words)
    assert "train loss: 3 values not finite, at steps 4, 5, 8" in text and "held-out loss: 1 value not finite" in text
    assert "nan" not in re.sub("finite", "", text).lower()


def test_one_point_is_a_dot(tmp_path):
    made = page(tmp_path, {"curves": {"train loss": [(7, 2.5)], "held-out loss": [(7, 2.5)], "accuracy": [(0, 0.0)]}})
    assert not made.all("path") and len(made.all("circle")) == 3
    assert all(0 < number < WIDTH for number in coordinates(made))
    assert "2.5 at step 7" in " ".join(made.words)


def test_long_curves_are_thinned_without_losing_a_spike(tmp_path):
    rng = random.Random(0)
    points = [(step, 2.0 + rng.gauss(0, 0.3)) for step in range(10_000)]
    points[6_543] = (6_543, 50.0)
    write_report(tmp_path / "report.html", {"curves": {"train loss": points}})
    made = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    raw, smooth = (attrs["d"] for attrs in made.all("path"))
    assert raw.count("L") <= 1.1 * MOST_POINTS and len(made.text) < 60_000
    heights = [float(y) for _, y in re.findall(r"([0-9.]+) ([0-9.]+)", raw)]
    assert min(heights) < 0.1 * HEIGHT                                         # the spike reaches the top
    assert min(float(y) for _, y in re.findall(r"([0-9.]+) ([0-9.]+)", smooth)) > 0.5 * HEIGHT


def test_a_smooth_curve_gets_no_second_line():
    [line] = chart("Rate", {"rate": [(step, 1e-4 * step) for step in range(1000)]}).lines
    assert line.path and not line.faint and not line.dots


@pytest.mark.parametrize("values", [
    (0.0, 0.0), (1e-9, 3e-9), (0.12, 0.98), (-5.0, 5.0), (1e12, 4e13), (99_990, 100_010), (3.0, 3.0), (1e29, -1e29),
    (0.9999999, 1.0000001)])
def test_ticks_are_few_different_and_inside_the_frame(values):
    made = chart("c", {"c": list(enumerate(values))})
    for ticks, most in ((made.x_ticks, WIDTH), (made.y_ticks, HEIGHT)):
        labels = [tick.label for tick in ticks]
        assert 2 <= len(labels) <= 8 and len(set(labels)) == len(labels), labels
        assert all(0 <= tick.at <= most for tick in ticks) and all(len(label) <= 9 for label in labels)


def test_ticks_are_round_numbers():
    assert [label for _, label in nice_ticks(0.0, 4.3, 5)] == ["0", "1", "2", "3", "4"]
    assert [label for _, label in nice_ticks(0.0, 2e-4, 5)] == ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]
    assert [label for _, label in nice_ticks(0.31, 0.93, 5, outwards=True)] == ["0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [label for _, label in nice_ticks(1, 3, 5, whole=True)] == ["1", "2", "3"]


def test_page_is_accessible(tmp_path):
    made = page(tmp_path, FULL)
    assert made.all("html")[0]["lang"] == "en"
    pictures = [attrs for attrs in made.all("svg") if attrs.get("aria-hidden") != "true"]
    ids = [attrs["id"] for _, attrs in made.tags if "id" in attrs]
    assert len(pictures) == len(made.all("title")) - 1 == len(made.all("desc")) == 3
    assert len(set(ids)) == len(ids)
    for attrs in pictures:
        assert attrs["role"] == "img" and set(attrs["aria-labelledby"].split()) <= set(ids)
    assert made.text.count("<table") == made.text.count("<thead") and len(made.all("th")) > 4
    assert all(attrs["scope"] in ("row", "col") for attrs in made.all("th"))


def luminance(colour: str) -> float:
    parts = [int(colour[i: i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_contrast_in_light_and_dark():
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for ink in ("text", "quiet", "good", "bad", "first", "second"):
            for paper in ("page", "card", "code"):
                light, dark = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def test_a_failed_report_leaves_the_old_one(tmp_path):
    write_report(tmp_path / "report.html", FULL)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(AttributeError):
        write_report(tmp_path / "report.html", {"curves": "not curves"})
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_a_killed_process_left_half_written_goes_with_the_next_page(tmp_path):
    (tmp_path / ".report.html.4194305.partial").write_text("<!doc")
    write_report(tmp_path / "report.html", {})
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

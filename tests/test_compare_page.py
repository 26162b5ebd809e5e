"""A study's page is one self-contained, escaped page; its plots are true, and readable with twelve methods."""
from __future__ import annotations

import random
import re
import shutil

import pytest
from test_compare import LENGTHS, near, played, study
from test_report import HOSTILE, Page

from tsugiki.compare.page import digits, render
from tsugiki.compare.plots import CHARACTER, TALL, Point, labelled, overlap, pareto, scatter
from tsugiki.compare.table import tabled

METHODS = ["full", "lora", {"name": "lora", "rank": 16, "rslora": True}, "dora", "series", "parallel", "prefix", "prompt",
           "llama_adapter", "ia3", "bitfit", "vera"]


def page_of(text: str = "a plain line") -> str:
    made, rng = study(methods=METHODS, general=["novel.txt"]), random.Random(0)
    results, _ = played(made, near(1e-3), fails=lambda c: c.variant.method == "vera")
    for result in results.values():
        if "test" in result:
            rows = [float(rng.random() < 0.7) for _ in range(50)]
            result["test"] |= {"accuracy": sum(rows) / 50, "rows": rows, "answers": [text]}
            result |= {"general": rng.random(), "trainable": rng.randrange(1, 10**6), "memory": rng.randrange(10**8, 10**9),
                       "seconds": rng.uniform(10, 90), "curve": [{"step": s, "tokens": 100 * s, "seconds": s, "loss": 5 / (s + 1)}
                                                                 for s in range(0, 9, 2)]}
        elif "failed" in result:
            result["failed"] = text
        else:
            result.setdefault("trainable", 1)
    results["data/base"] = {"test": {"metric": "accuracy", "accuracy": 0.5, "loss": 7.0, "answers": [text]}, "general": 0.2}
    about = {"protocol": [text], "environment": {"python": text}, "study": made.plain(), "samples": {"data": [(text, text)]}}
    return render(tabled(made, results, LENGTHS), about)


def test_the_page_has_every_part_and_loads_nothing():
    made = Page(page_of())
    text = " ".join(" ".join(made.words).split())
    for said in ("Which method?", "trained parameters", "forgetting", "Learning curves", "Learning rates", "At equal time",
                 "Answers side by side", "All pairs", "Runs that failed", "How this was made", "lora rank=16 rslora", "95 %"):
        assert said in text, said
    assert not re.search(r"https?:|//|@import|url\(", made.text.replace("<!doctype", ""))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in made.tags}
    assert any("default-src 'none'" in attrs.get("content", "") for attrs in made.all("meta"))
    ids = [attrs["id"] for _, attrs in made.tags if "id" in attrs]
    assert len(set(ids)) == len(ids) and len(made.all("figure")) > 20


def test_hostile_text_in_results_is_shown_and_never_markup():
    made = Page(page_of(HOSTILE))
    assert not {"script", "img"} & {tag for tag, _ in made.tags} and "alert(1)" in "".join(made.words)
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", made.text)


def test_the_front_is_what_nothing_beats_in_both():
    rng = random.Random(1)
    for larger in (True, False):
        points = [Point(str(i), rng.random(), rng.random()) for i in range(40)]
        front, sign = pareto(points, larger), 1 if larger else -1
        assert 1 < len(front) < 40
        for p in points:
            beaten = any(q.x < p.x and sign * q.y > sign * p.y for q in points)
            assert beaten == (p not in front)


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_twelve_methods_do_not_lie_on_one_another_nor_outside(seed):
    """Half of them crowded together, as methods of one size are."""
    rng, names = random.Random(seed), [m if isinstance(m, str) else "lora rank=16" for m in METHODS]
    spots = [(rng.uniform(200, 230), rng.uniform(50, 70)) if i % 2 else (rng.uniform(60, 370), rng.uniform(20, 250))
             for i in range(len(names))]
    boxes = [(x, y - 0.75 * TALL, x + CHARACTER * len(n), y + TALL / 4)
             for (x, y), n in zip(labelled(spots, names), names, strict=True)]
    for i, a in enumerate(boxes):
        assert a[0] > 40 and a[2] <= 401 and a[1] >= 0 and a[3] <= 263, (names[i], a)
        assert all(overlap(a, b) < 12 for b in boxes[:i]), names[i]


def test_a_scatter_needs_two_points_and_drops_what_is_not_known():
    assert scatter("t", "x", [Point("a", 1.0, 1.0), Point("b", float("nan"), 1.0)], True, False, digits) is None
    made = scatter("t", "x", [Point("a", 10.0, 1.0, 0.5, 1.5), Point("b", 1000.0, 2.0)], True, True, digits)
    assert [m.label for m in made.marks] == ["a", "b"] and made.marks[0].x < made.marks[1].x and made.marks[0].y > made.marks[1].y


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_wider_than_the_page_and_no_names_overlap(width, tmp_path):
    browsers = pytest.importorskip("playwright.sync_api", reason="needs playwright and its chromium")
    path = tmp_path / "report.html"
    path.write_text(page_of(), encoding="utf-8")
    with browsers.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except browsers.Error:
            pytest.skip("playwright has no chromium here")
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        boxes = tab.evaluate("[...document.querySelectorAll('.charts figure')].map(f => [...f.querySelectorAll('g text')].map("
                             "t => {const b = t.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]}))")
        browser.close()
    assert len(boxes) == 5
    for figure in boxes:
        assert all(overlap(a, b) < 40 for i, a in enumerate(figure) for b in figure[:i])

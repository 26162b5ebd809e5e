"""The page in a real browser: adapters answer side by side, by keyboard alone, on a phone, and nothing leaves the server."""
from __future__ import annotations

import os
import threading

import pytest
from serve_kit import ADMIN, KEY, Script, service, serving, until

from tsugiki.serve.auth import Keys

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = os.environ.get("TSUGIKI_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no Chromium at {CHROMIUM} (TSUGIKI_CHROMIUM names another)")
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """Opens the page at an address and gives it with what it complained of and asked for."""
    pages = []

    def go(url: str, viewport=DESKTOP, **more):
        context = browser.new_context(viewport=viewport, **more)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.problems, page.requests = [], []
        page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.on("request", lambda r: page.requests.append(r.url))
        page.goto(url)
        pages.append((context, page, url))
        return page
    yield go
    for context, page, url in pages:
        strangers = [r for r in page.requests if not r.startswith((url, "data:"))]
        context.close()
        assert not strangers, f"requests that leave the server: {strangers}"


def card(page, name: str):
    return page.locator(f"article[data-model={name}]")


def test_two_adapters_stream_different_answers_side_by_side(visit):
    engine = Script(words=30, gate=threading.Event())
    with serving(service(engine)) as url:
        page = visit(url)
        page.get_by_label("Prompt", exact=True).fill("what is two plus two?")
        page.get_by_label("Max tokens").fill("40")
        page.get_by_label("Seed").fill("7")
        page.get_by_role("button", name="Send").click()
        for name in ("alpha", "beta"):                # half of it is there while the other half is not yet made
            card(page, name).locator("pre", has_text=" ".join([name] * 15)).wait_for()
            assert card(page, name).locator("pre").inner_text() == " ".join([name] * 15), "it streams"
        engine.gate.set()
        page.get_by_text("All answered.").wait_for()
        for name in ("alpha", "beta"):
            assert card(page, name).locator("pre").inner_text() == " ".join([name] * 30)
            assert "done" in card(page, name).inner_text() and "lora" in card(page, name).inner_text()
        left, right = card(page, "alpha").bounding_box(), card(page, "beta").bounding_box()
        assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        assert {(r.adapter, r.sampling.max_tokens, r.sampling.seed) for r in engine.asked} == {("alpha", 40, 7), ("beta", 40, 7)}
        assert page.problems == []


def test_the_list_shows_each_adapters_method_size_and_score_and_the_throughput_is_live(visit):
    engine = Script(names=tuple(f"adapter-{n}" for n in range(12)))
    with serving(service(engine)) as url:
        page = visit(url)
        row = page.locator("#list li", has_text="adapter-3")
        assert all(said in row.inner_text() for said in ("lora", "1 k", "0.50", "chat", "in memory"))
        page.locator("#speed", has_text="1.5").wait_for()
        page.get_by_label("Filter adapters").fill("-11")
        assert page.locator("#list li").count() == 1
        engine.known["adapter-110"] = engine._info("adapter-110", "1")
        page.locator("#list li", has_text="adapter-110").wait_for()          # the list is asked for again by itself
        assert page.problems == []


def test_the_keyboard_alone_is_enough(visit):
    engine = Script(words=4000, pace=0.02)
    with serving(service(engine)) as url:
        page = visit(url)
        page.wait_for_selector("#list input")
        page.locator("#prompt:focus").wait_for()
        page.keyboard.type("hello")
        for _ in range(30):                           # back to the list, and take one adapter more
            page.keyboard.press("Shift+Tab")
            if page.evaluate("document.activeElement.value") == "base":
                break
        page.keyboard.press("Space")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "focus is to be seen"
        page.keyboard.press("Control+Enter")
        page.locator("article.on").nth(2).wait_for()
        until(lambda: len(engine.running) == 3)
        page.keyboard.press("Escape")
        page.get_by_text("Stopped.").wait_for()
        until(lambda: not engine.running)
        assert engine.finished["cancelled"] == 3 and "stopped" in card(page, "alpha").inner_text()
        assert page.problems == []


def test_errors_are_shown_where_they_belong(visit):
    engine = Script(max_length=30)
    with serving(service(engine)) as url:
        page = visit(url)
        page.wait_for_selector("#list input")
        page.keyboard.press("Control+Enter")
        page.get_by_text("Write a prompt first.").wait_for()
        page.get_by_label("Prompt", exact=True).fill("<b>bold</b> " * 30)
        page.keyboard.press("Control+Enter")
        page.get_by_text("2 of 2 failed.").wait_for()
        assert "leaves no room" in card(page, "beta").inner_text() and page.locator("article b").count() == 0
        assert [p for p in page.problems if "400" not in p] == []


def test_with_a_key_the_page_asks_for_it_and_keeps_it_in_its_tab(visit):
    with serving(service(Script(), keys=Keys((KEY.encode(),), (ADMIN.encode(),)))) as url:
        page = visit(url)
        assert page.locator("#main").is_hidden() and not [r for r in page.requests if "/v1/" in r]
        page.get_by_label("Key").fill("wrong-key-0123456789")
        page.keyboard.press("Enter")
        page.get_by_text("the key is not known").wait_for()
        page.get_by_label("Key").fill(KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#list input")
        page.get_by_label("Prompt", exact=True).fill("hi")
        page.keyboard.press("Control+Enter")
        page.get_by_text("All answered.").wait_for()
        page.reload()
        page.wait_for_selector("#list input")
        assert page.evaluate("localStorage.length") == 0 and page.evaluate("document.cookie") == ""
        assert all("401" in p for p in page.problems), page.problems
        assert KEY not in " ".join(page.requests)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(visit, scheme):
    engine = Script(names=("alpha", "a-name-of-an-adapter-that-is-longer-than-a-phone-is-wide-by-far"), words=20)
    with serving(service(engine)) as url:
        page = visit(url, PHONE, color_scheme=scheme)
        page.wait_for_selector("#list input", state="attached")
        page.locator("#adapters summary").click()
        page.get_by_label("Prompt", exact=True).fill("x" * 300)
        page.keyboard.press("Control+Enter")
        page.get_by_text("All answered.").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        boxes = [page.locator(at).first.bounding_box() for at in ("#send", "#stop", "#prompt", "article", "#list")]
        assert all(0 <= b["x"] and b["x"] + b["width"] <= PHONE["width"] for b in boxes)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        assert dark == (scheme == "dark") and page.problems == []


def test_every_text_of_the_page_can_be_told_from_its_ground(visit):
    """WCAG's contrast of 4.5 between the colours of the two schemes."""
    with serving(service(Script())) as url:
        for scheme in ("light", "dark"):
            page = visit(url, color_scheme=scheme)
            page.wait_for_selector("#list input")
            found = page.evaluate("""() => {
              const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                                   return .2126 * r + .7152 * g + .0722 * b; };
              const parse = text => text.match(/[\\d.]+/g).map(Number);
              const ground = node => { for (; node; node = node.parentElement) {
                const c = parse(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } };
              return [...document.querySelectorAll("#main *, header *")].filter(n => n.checkVisibility() && !n.disabled
                  && [...n.childNodes].some(t => t.nodeType === 3 && t.textContent.trim())).map(n => {
                const [a, b] = [light(parse(getComputedStyle(n).color).slice(0, 3)), light(ground(n))].sort((x, y) => y - x);
                return [n.textContent.trim().slice(0, 30), (a + .05) / (b + .05)]; });
            }""")
            assert len(found) > 15 and not [f for f in found if f[1] < 4.5], scheme

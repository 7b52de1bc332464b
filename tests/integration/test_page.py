"""The page /ui in a real browser: Chromium, headless, before real services with SmolLM2.

``ALORA_TEST_PAGE_PICTURE=docs/images/page.png`` keeps the picture that the documentation shows.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, Request, async_playwright, expect

from deployment import Deployed
from front_door import FrontDoor, front_door

pytestmark = pytest.mark.asyncio(loop_scope="session")

PATIENCE_MILLISECONDS = 60_000
_SOMETHING = re.compile(r"[^\s…]")
PLAIN, TYPED = "answer", "jailbreak"
"""An adapter that nothing defines, and an intrinsic."""
DOCUMENT = "A password of four random words is long, and a picture helps to remember them. "
QUESTION = "How do I choose a password that I can remember?"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def door(smollm2: Deployed) -> AsyncIterator[FrontDoor]:
    async with front_door(smollm2.local.router_address) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def page(door: FrontDoor) -> AsyncIterator[Page]:
    """The page, opened. Whatever it asks of other hosts, and whatever it complains about, fails the test."""
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    elsewhere, complaints = list[str](), list[str]()

    def note(request: Request) -> None:
        if not request.url.startswith((door.url, "data:")):
            elsewhere.append(request.url)

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        opened = await browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        opened.set_default_timeout(PATIENCE_MILLISECONDS)
        opened.on("request", note)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        await opened.goto(f"{door.url}/ui")
        yield opened
        await browser.close()
    assert elsewhere == []
    assert complaints == []


WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    for (const turn of document.querySelectorAll("#turns > li")) {
      seen.push(["said", document.body.dataset.busy, turn.querySelector(".said").textContent]);
      for (const line of turn.querySelectorAll(".verdicts li"))
        seen.push([line.dataset.adapter, line.dataset.state, line.querySelector("span").textContent]);
    }
  }).observe(document.getElementById("turns"), { subtree: true, childList: true, attributes: true });
}"""
"""Notes every text and state that turns and verdicts ever show."""
PHASES = ("queue", "fetch", "prefill", "adapter load", "decode")
_PHASES = re.compile(", ".join(rf"{name} (\d+) ms" for name in ("start", *PHASES)))
_TOKENS = re.compile(r"(\d+) cached, (\d+) computed")
_LIKELIHOOD = re.compile(r"[01](\.\d{1,3})?")


WIDTHS = """(bar) => {
  const width = (shown) => shown.getBoundingClientRect().width;
  return [...bar.children].map((part) => width(part) / width(bar));
}"""


@dataclass(frozen=True, slots=True)
class Row:
    """What the timeline tells of one request.

    Attributes:
        asked: who.
        start: when, in milliseconds after Send.
        phases: milliseconds by name.
        total: milliseconds.
        widths: of its bar's parts, the empty one until ``start`` first, as shares of the bar.
    """

    asked: str
    start: int
    phases: dict[str, int]
    total: int
    widths: list[float]
    cached: int
    computed: int


async def timeline(page: Page) -> list[Row]:
    """All rows, the last request first."""
    rows = []
    for row in await page.locator("#requests tr").all():
        phases, tokens = [await bar.get_attribute("aria-label") or "" for bar in await row.locator("[role=img]").all()]
        spent, came = _PHASES.fullmatch(phases), _TOKENS.fullmatch(tokens)
        assert spent, phases
        assert came, tokens
        start, *milliseconds = map(int, spent.groups())
        named = dict(zip(PHASES, milliseconds, strict=True))
        total, told = await row.locator("td.number").all_inner_texts()
        assert int(total) >= max(milliseconds)
        assert told == f"{came[1]}, {came[2]}"
        widths = await row.locator("[role=img]").first.evaluate(WIDTHS)
        who, cached, computed = await row.locator("th").inner_text(), int(came[1]), int(came[2])
        rows.append(Row(who, start, named, int(total), widths, cached, computed))
    return rows


def on_the_answer(rows: list[Row], adapter: str) -> Row:
    """Of an adapter's two verdicts that on the second turn, whichever came first."""
    return max((row for row in rows if row.asked == adapter), key=lambda row: row.cached + row.computed)


async def converse(page: Page, *adapters: str, tokens: int = 32, document: str = "") -> None:
    """Ask a question, and wait until everything about it is told."""
    expect.set_options(timeout=PATIENCE_MILLISECONDS)
    for adapter in adapters:
        await page.locator(f'#adapters input[value="{adapter}"]').check()
    await page.get_by_label("Longest answer").fill(str(tokens))
    await page.get_by_label("Document").fill(document)
    await page.get_by_label("Your message").fill(QUESTION)
    await page.keyboard.press("Enter")
    turns = page.locator("#turns > li")
    await expect(turns).to_have_count(2)
    await expect(turns.nth(0).locator(".said")).to_have_text(QUESTION)
    await expect(page.locator("body")).to_have_attribute("data-busy", "false")
    for turn in (0, 1):
        for adapter in adapters:
            verdict = turns.nth(turn).locator(f'.verdicts li[data-adapter="{adapter}"]')
            await expect(verdict).to_have_attribute("data-state", "done")
            await expect(verdict.locator("span")).to_have_text(_SOMETHING)


async def test_it_chats_shows_verdicts_as_they_come_and_where_time_went(page: Page) -> None:
    await page.evaluate(WATCH)
    await converse(page, PLAIN, TYPED)
    seen = [tuple(noted) for noted in await page.evaluate("seen")]
    answer = await page.locator("#turns .said").nth(1).inner_text()
    grown = list(dict.fromkeys(text for what, busy, text in seen if what == "said" and busy == "true"))
    grown = [text for text in grown if text and text != QUESTION]
    assert len(grown) >= 2, "the answer grows: it is there before it is whole"
    assert all(after.startswith(before) for before, after in itertools.pairwise(grown))
    assert grown[-1] == answer
    said_so_far = {text for what, state, text in seen if (what, state) == (PLAIN, "running")}
    assert said_so_far - {"…"}, "a text is shown while it is said"
    assert (TYPED, "running", "…") in seen, "an intrinsic's result comes as a whole"
    for verdict in await page.locator(f'.verdicts li[data-adapter="{TYPED}"] span').all_inner_texts():
        assert _LIKELIHOOD.fullmatch(verdict)

    rows = await timeline(page)
    base = await page.locator("#model").inner_text()
    assert sorted(row.asked for row in rows) == sorted([base, PLAIN, PLAIN, TYPED, TYPED])
    (answered,) = [row for row in rows if row.asked == base]
    assert answered.phases["decode"] > 0
    assert all(row.phases["decode"] + row.phases["prefill"] > 0 for row in rows)
    longest = max(row.start + row.total for row in rows)
    assert abs(int(await page.locator("#longest").inner_text()) - longest) <= 2
    for row in rows:  # all on one scale, told in whole milliseconds
        shares = [milliseconds / longest for milliseconds in (row.start, *row.phases.values())]
        assert row.widths == pytest.approx(shares, abs=0.005 + 2 / longest)
    for adapter in (PLAIN, TYPED):
        assert on_the_answer(rows, adapter).start >= answered.start + answered.total - 2

    for adapter in (PLAIN, TYPED):  # on the answer, they reuse all that the base model computed
        asked = on_the_answer(rows, adapter)
        assert asked.cached > asked.computed

    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
    await page.emulate_media(color_scheme="light")
    if picture := os.environ.get("ALORA_TEST_PAGE_PICTURE"):
        await page.reload()
        await converse(page, "jailbreak", "answerability", "uncertainty", document=DOCUMENT)
        await page.screenshot(path=Path(picture), full_page=True)


async def test_a_browser_that_iterates_no_stream_shows_answers_as_well(page: Page) -> None:
    """WebKit does not."""
    await page.add_init_script(
        "delete ReadableStream.prototype[Symbol.asyncIterator]; delete ReadableStream.prototype.values;"
    )
    await page.reload()
    await converse(page, PLAIN, TYPED, tokens=8)
    await expect(page.locator("#turns .said").nth(1)).to_have_text(_SOMETHING)
    assert await page.locator("#turns .bad").count() == 0


async def test_a_document_is_seen_by_the_base_model_and_by_adapters_from_the_same_kv(page: Page) -> None:
    """SmolLM2's template has no place for one; the page's system message stands before it."""
    await converse(page, TYPED, tokens=8, document=DOCUMENT * 4)
    rows = await timeline(page)
    words = len((DOCUMENT * 4).split())
    assert len(rows) == 3
    assert all(row.cached + row.computed > words for row in rows)
    asked = on_the_answer(rows, TYPED)
    assert asked.cached > words > asked.computed


async def test_an_answer_is_stopped_and_the_conversation_goes_on(page: Page, smollm2: Deployed) -> None:
    expect.set_options(timeout=PATIENCE_MILLISECONDS)
    await page.get_by_label("Your message").fill("Tell me a very long story.")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#turns > li").nth(1).locator(".said")).to_have_text(_SOMETHING)
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator("#turns > li").nth(1)).to_contain_text("(stopped)")
    await smollm2.wait_for_load(running=0)
    await page.get_by_role("button", name="New conversation").click()
    await expect(page.locator("#turns > li")).to_have_count(0)


async def test_what_users_and_models_write_is_text(page: Page) -> None:
    expect.set_options(timeout=PATIENCE_MILLISECONDS)
    markup = "<img src=x onerror=alert(1)>"
    await page.get_by_label("Your message").fill(markup)
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#turns > li").first.locator(".said")).to_have_text(markup)
    assert await page.locator("#turns img").count() == 0
    await page.get_by_role("button", name="Stop").click()

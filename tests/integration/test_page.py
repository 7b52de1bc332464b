"""The page /ui in a real browser: Chromium, headless, before real services with SmolLM2.

``ALORA_TEST_PAGE_PICTURE=docs/images/page.png`` keeps the picture that the documentation shows.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
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


async def test_it_chats_shows_verdicts_as_they_come_and_where_time_went(page: Page) -> None:
    expect.set_options(timeout=PATIENCE_MILLISECONDS)
    await page.get_by_label("jailbreak", exact=False).first.check()
    await page.get_by_label("Longest answer").fill("32")
    await page.get_by_label("Your message").fill(QUESTION)
    await page.keyboard.press("Enter")
    turns = page.locator("#turns > li")
    await expect(turns).to_have_count(2)
    await expect(turns.nth(0).locator(".said")).to_have_text(QUESTION)
    # The answer grows: it is there before it is whole.
    await expect(turns.nth(1).locator(".said")).to_have_text(_SOMETHING)
    await expect(page.locator("body")).to_have_attribute("data-busy", "true")
    for turn in (0, 1):
        verdict = turns.nth(turn).locator('.verdicts li[data-adapter="jailbreak"]')
        await expect(verdict).to_have_attribute("data-state", "done")
        await expect(verdict).to_have_text(_SOMETHING)
    await expect(page.locator("body")).to_have_attribute("data-busy", "false")

    rows = page.locator("#requests tr")
    await expect(rows).to_have_count(3)
    asked = {await rows.nth(number).locator("th").inner_text() for number in range(3)}
    assert asked == {"jailbreak", await page.locator("#model").inner_text()}
    last = rows.first  # the verdict on the answer: it reuses all that the base model computed
    cached, computed = map(int, (await last.locator("td").last.inner_text()).split(", "))
    assert cached > computed
    assert "prefill" in (await last.locator("[role=img]").first.get_attribute("aria-label") or "")

    found = await Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    if picture := os.environ.get("ALORA_TEST_PAGE_PICTURE"):
        await page.screenshot(path=Path(picture), full_page=True)


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

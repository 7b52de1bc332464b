"""What holds of the page without a browser."""

from __future__ import annotations

import re
from importlib.resources import files

from fake_services import FakePrefill, FakeWorker, deployment
from front_door import open_door
from openai_front.page import content_policy

PAGE = files("openai_front.page").joinpath("index.html").read_text("utf-8")


def test_it_names_no_other_host_and_holds_all_it_needs() -> None:
    assert not re.search(r"https?://|//cdn|@import|url\(", PAGE)
    assert re.findall(r'(?:src|href)="([^"]*)"', PAGE) == ["data:,"]
    assert 'style="' not in PAGE
    assert not re.search(r"\bon\w+=\"", PAGE)


def test_nothing_else_may_run_in_it() -> None:
    policy = content_policy(PAGE)
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2
    assert content_policy(PAGE.replace("use strict", "use strict;")) != policy


async def test_it_is_served_unless_it_is_off() -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _):
        async with open_door(router.address) as door:
            shown = await door.http.get("/ui")
            assert shown.text == PAGE
            assert "default-src 'none'" in shown.headers["content-security-policy"]
        async with open_door(router.address, page=False) as door:
            assert (await door.http.get("/ui")).status_code == 404

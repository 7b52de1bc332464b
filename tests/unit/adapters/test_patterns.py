"""Patterns of adapter files: they match as ``re`` does, or the file is refused; none holds a worker up."""

from __future__ import annotations

import re
import threading
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_serve.adapters.patterns import MAX_CHARACTERS, Patterns
from alora_serve.errors import AdapterRefusedError

PIECES = [*"ahq01x.?+|()^$", "layers", "w1", "lm_head", ".*", ".+?", "(?:", "(?P<idx>", "[^.]", "[a-z_]", "{2}", "{,3}"]
PIECES += ["{1,}", "(?=", "(?!", "(?i:", r"\.", r"\d+", r"\b", r"\1"]
NAMES = ("layers.0.q", "h.11.w1", "lm_head", "a")  # short: `re` cannot be stopped


def found_by_re(pattern: str, name: str) -> tuple[bool, dict[str, str] | None]:
    found = re.match(pattern, name)
    return re.fullmatch(pattern, name) is not None, None if found is None else found.groupdict()


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8))
def test_what_is_read_matches_as_re_does(parts: list[str]) -> None:
    pattern = "".join(parts)
    patterns = Patterns(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NAMES:
            try:
                expected = found_by_re(pattern, name)
            except re.error:
                with pytest.raises(AdapterRefusedError, match="is not a regular expression"):
                    patterns.match(pattern, name)
            else:
                assert (patterns.fullmatch(pattern, name), patterns.match(pattern, name)) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj{e}",
        "(?:q_proj){i<=1}",
        "(?:a{999})(?#){999}",
        "(?x)(?:a{999}) {999}",
        "a{4294967295}",
        f"a{{{'9' * 5_000}}}",
        "[[:alpha:]]+",
        "\ud800",
        "(?i)[\x00-\U0010ffff]",
        r"[\U00000000-\U0010ffff]",
        "\n",
    ],
    ids=ascii,
)
def test_what_re_reads_otherwise_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterRefusedError, match="braces that count repeats"):
        Patterns().fullmatch(pattern, "q_proj")


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "*",
        "(" * 5_000 + ")" * 5_000,
        "(?a)(?u)",
        r"\m",
        "(?R)",
        "(?V1)a",
    ],
    ids=lambda pattern: pattern[:16],
)
def test_what_re_does_not_read_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterRefusedError, match="is not a regular expression"):
        Patterns().fullmatch(pattern, "q_proj")


LONGEST = "|".join(["q_proj"] * MAX_CHARACTERS)[: MAX_CHARACTERS - 6].rstrip("|")


@pytest.mark.parametrize(
    "pattern",
    [
        "a" * (MAX_CHARACTERS + 1),
        f"(?:{LONGEST}){{2}}",
        "(?:a{999}){999}",
        "(?:(?:a{,99}){99,}){99}",
        r"(?:a{999}\\){999}",
        r"(?:[)]{999}\)){999}",
        "(?:[]a-z]{4}b){999}",
        f"(?:{'{}' * 99}){{99}}",
        "(?x)(?:a{999}){999}#)",
    ],
    ids=lambda pattern: pattern[-24:],
)
def test_a_pattern_is_only_so_long(pattern: str) -> None:
    with pytest.raises(AdapterRefusedError, match=f"more than {MAX_CHARACTERS} characters with its repeats"):
        Patterns(60).fullmatch(pattern, "q_proj")


BY_LAYER = "|".join(rf"model\.layers\.\d{{1,2}}\.(?:\w{{1,9}}\.){{1,2}}{name}_proj" for name in "qkvogud")


@pytest.mark.parametrize("pattern", [LONGEST, "(?:q_{1,9}proj){1,}", "[qk]{1,99}_proj", BY_LAYER])
def test_repeats_side_by_side_add_up(pattern: str) -> None:
    name = "model.layers.10.self_attn.q_proj" if pattern is BY_LAYER else "q_proj"
    assert Patterns(60).fullmatch(pattern, name)


SLOW, LONG_NAME = r"(?:.|..|...)+(?!.)\d", "model.layers.0.self_attn.q_proj" * 3


def test_one_that_goes_over_the_text_without_end_is_refused_in_time() -> None:
    with pytest.raises(AdapterRefusedError, match=r"more than 0\.2 s"):
        Patterns(0.2).fullmatch(SLOW, LONG_NAME)


def test_the_time_is_for_all_patterns_together() -> None:
    patterns = Patterns(0.2)
    for _ in range(2):
        with pytest.raises(AdapterRefusedError, match=r"more than 0\.2 s"):
            patterns.fullmatch(SLOW, LONG_NAME)
    with pytest.raises(AdapterRefusedError, match=r"more than 0\.2 s"):
        patterns.match("q_proj", "q_proj")


def test_other_threads_go_on_meanwhile() -> None:
    ticks, over = [], threading.Event()

    def tick() -> None:
        while not over.wait(0.01):
            ticks.append(time.monotonic())

    other = threading.Thread(target=tick)
    other.start()
    with pytest.raises(AdapterRefusedError):
        Patterns(0.5).fullmatch(SLOW, LONG_NAME)
    over.set()
    other.join()
    assert len(ticks) > 5

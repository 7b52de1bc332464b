"""Patterns of JSON schemas are held to, whatever they say of control characters, quotation marks and backslashes."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_serve.model.structure.patterns import UNWRITABLE, narrowed
from held_forms import holds, refusal, schema

LETTERS = 'a"\\\n\t\x01\x1f\x7f]é😀'


def matched(pattern: str, texts: str | list[str]) -> list[str]:
    """Those of the texts that an answer of this pattern may be."""
    form = schema(type="string", pattern=pattern)
    return [text for text in texts if holds(form, json.dumps(text, ensure_ascii=False))]


@pytest.mark.parametrize(
    ("pattern", "letters"),
    [
        (r'^[^"]$', "a\\\n\t]é😀"),
        (r"^[^\\]$", 'a"\n\t]é😀'),
        (r"^[^\x20-\x7e]$", "\n\té😀"),
        (r"^[^!-~]{1}$", "\n\té😀"),
        (r"^[\x00-\x1f]$", "\n\t"),
        ("^[\x00-\x1f]$", "\n\t"),
        (r"^[]\]]$", "]"),
        (r'^[^]"]$', "a\\\n\té😀"),
        (r"^[^[a-z]&&[^é]]$", '"\\\n\t]é😀'),
        (r"^[[:cntrl:]a]$", "a\n\t"),
        (r"^\p{Cc}$", "\n\t"),
        (r"^\P{P}$", "a\n\té😀"),
        (r"^\pL$", "aé"),
        (r"^(?:\x01|\x{1f}|\u007f|\u{1}|\U00000001|\a|\v|\x61)$", "a"),
        ("^(\x01|\x7f|a)$", "a"),
        (r"^(?<name[0]>[^\\]|\\)$", 'a"\\\n\t]é😀'),
        (r"^.$", 'a"\\\t]é😀'),
        (r"^(?s:.)$", 'a"\\\n\t]é😀'),
        (r"^\D$", 'a"\\\n\t]é😀'),
        (r"^\[|\]$", "]"),
    ],
)
def test_a_pattern_is_held_to(pattern: str, letters: str) -> None:
    assert matched(pattern, LETTERS) == list(letters)


def test_names_are_held_to_their_patterns() -> None:
    form = schema(
        type="object", patternProperties={'^[^"]$': {"type": "integer"}}, additionalProperties={"type": "string"}
    )
    assert holds(form, '{"a":1}')
    assert holds(form, r'{"\"":"a"}')
    assert not holds(form, r'{"\"":1}')


@pytest.mark.parametrize("pattern", ["^a\x01b$", r"^a\x01b$", r"^[\x01\x7f]$"])
def test_a_pattern_that_only_control_characters_fit_is_refused(pattern: str) -> None:
    error = refusal(schema(items={"type": "string", "pattern": pattern}, minItems=1, type="array"))
    assert "at /items: it allows no string without control characters" in str(error)


def test_a_broken_pattern_is_refused() -> None:
    for pattern in ("[a", "[^]", "a[[]", "[\\", "\\x1", "(?x:a)", "(?P<a"):
        refusal(schema(type="string", pattern=pattern))


def test_the_flag_that_changes_how_a_pattern_is_read_is_refused() -> None:
    with pytest.raises(ValueError, match="'x'"):
        narrowed("a(?i-sx:b)")
    assert narrowed(r"\(?x(?i:b)") == r"\(?x(?i:b)"


parts = st.sampled_from(
    [r"\x00-\x1f", "\x0b-\x1f", r"\x20-\x7e", "!-~", '"', r"\\", r"\n", r"\t", r"\x01", r"\x7f", "é"]
)
classes = st.tuples(st.sampled_from(["[", "[^"]), st.lists(parts, min_size=1, max_size=3)).map(
    lambda told: told[0] + "".join(told[1]) + "]"
)
atoms = classes | st.sampled_from([".", r"\D", "a", '"', r"\\", r"\x01", "\x01", r"\n"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda either: f"({either[0]}|{either[1]})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}"])).map(lambda told: f"({told[0]}){told[1]}"),
    ),
    max_leaves=4,
)


@settings(max_examples=60)
@given(expressions, st.booleans())
def test_strings_fit_a_pattern_as_they_do_elsewhere(expression: str, whole: bool) -> None:
    """Against Python's regular expressions, with all strings of two characters."""
    letters = 'a"\\\n\x01\x7fé'
    texts = ["", *letters, *map("".join, itertools.product(letters, repeat=2))]
    searched = re.compile(f"^({expression})\\Z" if whole else expression)
    expected = [text for text in texts if searched.search(text) and not UNWRITABLE.search(text)]
    pattern = f"^({expression})$" if whole else expression
    if expected:
        assert matched(pattern, texts) == expected

"""From answers to results, where there is no reference or the reference gives up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.errors import IntrinsicOutputError
from alora_serve.intrinsics import Answer, Outcome, ScoredToken, conclude, parse_definition
from alora_serve.intrinsics.json_paths import Json, Path, literal_start, pointer, value_at

NEST = "{type: nest, input_path: [], field_name: a}"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def concluded(transformations: str, text: str, *tokens: ScoredToken) -> Outcome:
    raw = f"model: ~\nresponse_format: ~\ntransformations: [{transformations}]\n"
    return conclude(parse_definition(raw.encode()), Answer(text, tokens))


def token(text: str, probability: float, **alternatives: float) -> ScoredToken:
    others = tuple((other.encode(), math.log(value)) for other, value in alternatives.items())
    return ScoredToken(text.encode(), math.log(probability), others)


def test_probabilities_stand_beside_the_result_by_their_place_in_the_answer() -> None:
    outcome = concluded(
        "{type: likelihood, input_path: [v], categories_to_values: {yes: 1, no: 0}}, "
        "{type: project, input_path: [], retained_fields: {v: likelihood}}",
        '{"v": "yes"}',
        token('{"v": "', 1.0),
        token("yes", 0.6, yes=0.6, n=0.15, no=0.05, nothing=0.2),
        token('"}', 1.0),
    )
    assert outcome.result == {"likelihood": pytest.approx(0.75)}
    assert outcome.probabilities == {"/v": {"yes": pytest.approx(0.75), "no": pytest.approx(0.25)}}


def test_booleans_are_weighed_as_json_spells_them() -> None:
    outcome = concluded(
        "{type: likelihood, input_path: [], categories_to_values: {true: 1, false: 0}}",
        "true",
        token("true", 0.6, false=0.2, true=0.6),
    )
    assert outcome.result == pytest.approx(0.75)


def test_a_category_that_begins_inside_a_token_is_weighed_against_tokens_that_begin_alike() -> None:
    alternatives = {'"no': 0.3, '"yes': 0.6, "no": 0.05, '"': 0.02}
    first = ScoredToken(b'"yes', math.log(0.6), tuple((t.encode(), math.log(p)) for t, p in alternatives.items()))
    outcome = concluded(
        "{type: likelihood, input_path: [], categories_to_values: {yes: 1, no: 0}}", '"yes"', first, token('"', 1.0)
    )
    assert outcome.result == pytest.approx(2 / 3)


def test_characters_of_many_bytes_before_a_category_do_not_shift_it() -> None:
    text = '{"ключ": "да"}'
    outcome = concluded(
        "{type: likelihood, input_path: [ключ], categories_to_values: {да: 1, нет: 0}}",
        text,
        ScoredToken('{"клю'.encode()[:7], 0.0),
        ScoredToken('{"клю'.encode()[7:] + 'ч": "'.encode(), 0.0),
        token("да", 0.5, нет=0.25),
        token('"}', 1.0),
    )
    assert outcome.result == {"ключ": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("transformations", "text", "problem"),
    [
        ("", '{"a": ', "not JSON"),
        ("", "[" * 100_000, "not JSON"),
        ("{type: explode, input_path: [], target_field: a}", "{}", "needs a list"),
        ("{type: explode, input_path: [], target_field: a}", "[1]", "needs a record"),
        ("{type: explode, input_path: [], target_field: a}", "[{}]", "needs 'a'"),
        ("{type: explode, input_path: [], target_field: a}", '[{"a": 1}]', "needs a list"),
        ("{type: drop_duplicates, input_path: [], target_fields: [a]}", "[{}]", "needs 'a'"),
        ("{type: project, input_path: [], retained_fields: [a]}", "3", "needs a list"),
        ("{type: merge_spans, input_path: [], group_fields: [], begin_field: b, end_field: e}", '[{"b": 0}]', "'e'"),
        (
            "{type: merge_spans, input_path: [], group_fields: [], begin_field: b, end_field: e}",
            '[{"b": 0, "e": 1, "x": 2}]',
            "project",
        ),
        (
            "{type: merge_spans, input_path: [], group_fields: [], begin_field: b, end_field: e}",
            '[{"b": 0, "e": 1}, {"b": 0, "e": 2}]',
            "begin alike",
        ),
        (
            "{type: merge_spans, input_path: [], group_fields: [g], begin_field: b, end_field: e}",
            '[{"b": 0, "e": 1, "g": 1}, {"b": 0, "e": 2, "g": "x"}]',
            "cannot order",
        ),
        ("{type: likelihood, input_path: [], categories_to_values: {yes: 1}}", '"yes"', "no log-probabilities"),
        ("{type: likelihood, input_path: [], categories_to_values: {yes: 1}}", '["yes"]', "own words"),
        (
            f"{NEST}, {{type: likelihood, input_path: [a], categories_to_values: {{yes: 1}}}}",
            '"yes"',
            "nothing at '/a'",
        ),
    ],
)
def test_an_answer_that_a_transformation_cannot_take_is_an_error(transformations: str, text: str, problem: str) -> None:
    with pytest.raises(IntrinsicOutputError, match=problem):
        concluded(transformations, text)


def test_an_error_is_short_however_long_the_answer() -> None:
    for text in ("x" * 50_000, json.dumps(["x" * 50_000]), json.dumps({"x" * 50_000: 1})):
        with pytest.raises(IntrinsicOutputError) as failed:
            concluded("{type: explode, input_path: [], target_field: a}", text)
        assert len(str(failed.value)) < 1000


@pytest.mark.parametrize("number", [-1, 2, True, "0", 1.0])
def test_a_sentence_that_was_not_tagged_cannot_be_cited(number: object) -> None:
    raw = b"""
model: ~
response_format: ~
sentence_boundaries: {last_message: i}
transformations:
  - {type: decode_sentences, source: last_message, input_path: [s], output_names: {text: text}}
"""
    definition = parse_definition(raw)
    with pytest.raises(IntrinsicOutputError, match="cites sentence"):
        conclude(definition, Answer(json.dumps({"s": number}), sentences={"last_message": {}}))


@given(VALUES, st.data())
def test_the_place_of_every_value_is_found_in_its_text(value: Json, data: st.DataObject) -> None:
    text = json.dumps(value, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=data.draw(st.booleans()))
    for path in _paths(value):
        start = literal_start(text, path)
        assert json.JSONDecoder().raw_decode(text, start)[0] == value_at(value, path)


def _paths(value: Any, path: Path = ()) -> list[Path]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in inner for deeper in _paths(item, (*path, key)))]


def test_of_a_field_given_twice_the_last_counts() -> None:
    assert literal_start('{"a": 1, "a": 2}', ("a",)) == 14


def test_pointers_escape_what_would_be_read_as_a_step() -> None:
    assert pointer(("a/b", 0, "c~")) == "/a~1b/0/c~0"

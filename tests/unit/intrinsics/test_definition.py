"""An ``io.yaml`` is understood as a whole or refused by name."""

from __future__ import annotations

import json

import pytest

from alora_serve.errors import AdapterRefusedError
from alora_serve.intrinsics import MAX_DEFINITION_BYTES, parse_definition
from alora_serve.intrinsics.likelihood import Likelihood

MINIMAL = "model: ~\nresponse_format: ~\ntransformations: ~\n"


def test_a_minimal_file_asks_the_conversation_as_it_is() -> None:
    definition = parse_definition(MINIMAL.encode())
    assert (definition.instruction, definition.json_schema, definition.transformations) == (None, "", ())
    assert not definition.needs_logprobs
    assert not definition.needs_last_message


def test_sentences_are_tagged_nowhere_by_null_and_false_alike() -> None:
    for nowhere in ("~", "false"):
        definition = parse_definition(f"{MINIMAL}sentence_boundaries: {nowhere}\n".encode())
        assert definition.sentence_boundaries == {}
        assert not definition.needs_last_message


def test_the_schema_keeps_its_order_whether_it_is_text_or_yaml() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["x"]}}}
    for written in (json.dumps(json.dumps(schema)), json.dumps(schema)):
        raw = f"model: ~\nresponse_format: {written}\ntransformations: ~\n"
        assert parse_definition(raw.encode()).json_schema == json.dumps(schema)


def test_parameters_of_chat_completions_become_sampling_parameters() -> None:
    definition = parse_definition(
        f"""{MINIMAL}
parameters:
  max_completion_tokens: 6
  temperature: 0.5
  stop: END
  seed: 3
  extra_body: {{top_k: 5, repetition_penalty: 1.5, chat_template_kwargs: {{date_string: today}}}}
""".encode()
    )
    sampling = definition.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.stop, sampling.seed) == (6, 0.5, ("END",), 3)
    assert (sampling.top_k, sampling.repetition_penalty) == (5, 1.5)
    assert definition.template_arguments == {"date_string": "today"}


def test_an_unquoted_yes_is_a_word_and_true_is_a_boolean() -> None:
    transformation = "{type: likelihood, input_path: [], categories_to_values: {yes: 1, no: 0, true: 2}}"
    definition = parse_definition(f"model: ~\nresponse_format: ~\ntransformations: [{transformation}]\n".encode())
    (likelihood,) = definition.transformations
    assert isinstance(likelihood, Likelihood)
    assert likelihood.categories == {"yes": 1, "no": 0, "true": 2}


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ("model: ~\n", "lacks response_format, transformations"),
        (f"{MINIMAL}colour: red\n", "colour"),
        (f"{MINIMAL}docs_as_message: roman\n", "docs_as_message = 'roman'"),
        (f"{MINIMAL}logprobs_workaround: true\n", "logprobs_workaround"),
        (f"{MINIMAL}instruction: 3\n", "instruction = 3"),
        (f"{MINIMAL}instruction: 'a {{b.__class__}}'\n", "b.__class__"),
        (f"{MINIMAL}instruction: 'a {{b!r}}'\n", "instruction"),
        (f"{MINIMAL}instruction: 'a {{b:>9}}'\n", "instruction"),
        (f"{MINIMAL}instruction: 'a {{0}}'\n", "instruction"),
        (f"{MINIMAL}instruction: 'a {{'\n", "instruction"),
        (f"{MINIMAL}parameters: {{best_of: 3}}\n", "parameters.best_of"),
        (f"{MINIMAL}parameters: {{temperature: hot}}\n", "parameters.temperature = 'hot'"),
        (f"{MINIMAL}parameters: {{temperature: .nan}}\n", "parameters.temperature"),
        (f"{MINIMAL}parameters: {{temperature: 1{'0' * 400}}}\n", "parameters.temperature"),
        (f"{MINIMAL}parameters: {{max_completion_tokens: 0}}\n", "parameters.max_completion_tokens = 0"),
        (f"{MINIMAL}parameters: {{max_tokens: 4294967296}}\n", "parameters.max_tokens = 4294967296"),
        (f"{MINIMAL}parameters: {{seed: 18446744073709551616}}\n", "parameters.seed"),
        (f"{MINIMAL}parameters: {{max_tokens: true}}\n", "parameters.max_tokens = True"),
        (f"{MINIMAL}parameters: {{extra_body: {{guided_json: 1}}}}\n", "parameters.extra_body.guided_json"),
        (f"{MINIMAL}sentence_boundaries: {{first_message: c}}\n", "sentence_boundaries.first_message"),
        (f"{MINIMAL}parameters: {{extra_body: {{chat_template_kwargs: {{a: 2024-01-01}}}}}}\n", "kwargs"),
        (f"{MINIMAL}sentence_boundaries: c\n", "sentence_boundaries"),
        (f"{MINIMAL}sentence_boundaries: true\n", "sentence_boundaries"),
        (f"{MINIMAL}parameters: {{response_format: {{type: json_object}}}}\n", "parameters.response_format.type"),
        (f"{MINIMAL}parameters: {{response_format: {{type: json_schema}}}}\n", "response_format.json_schema"),
        (f"{MINIMAL}model: ~\n", "'model' is no key or stands twice"),
        ("model: ~\nresponse_format: '{'\ntransformations: ~\n", "response_format"),
        ("model: ~\nresponse_format: [1]\ntransformations: ~\n", "response_format"),
        ("model: ~\nresponse_format: {a: 2024-01-01}\ntransformations: ~\n", "response_format"),
        ("model: ~\nresponse_format: {a: .inf}\ntransformations: ~\n", "response_format"),
        ("model: ~\nresponse_format: ~\ntransformations: {type: nest}\n", "transformations"),
        ("- 1\n", "the file is not a mapping"),
        ("", "the file is not a mapping"),
        ("{1: 2}", "the file is not a mapping"),
        ("a: [", "cannot be read"),
        ("a: 2027-02-30", "cannot be read"),
        ("a: !!bool maybe", "cannot be read"),
        (f'{MINIMAL}"\\ud800": 1\n', "half of a surrogate pair"),
        (f'{MINIMAL}instruction: "\\ud800"\n', "half of a surrogate pair"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read"),
        ("a: &a [x]\nb: *a\n", "aliases are not read"),
        ("\xff", "the file is not a mapping"),
        ("[" * 1_000, "cannot be read"),
        ("#" * (MAX_DEFINITION_BYTES + 1), "more than"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(raw: str, named: str) -> None:
    with pytest.raises(AdapterRefusedError) as refused:
        parse_definition(raw.encode())
    assert named in str(refused.value)
    assert "io.yaml" in str(refused.value)


LONG = "x" * 50_000


@pytest.mark.parametrize("raw", [LONG, f"{MINIMAL}? {LONG}\n: 1", f"{MINIMAL}instruction: [{LONG}]"])
def test_a_refusal_is_short_however_long_the_file(raw: str) -> None:
    with pytest.raises(AdapterRefusedError) as refused:
        parse_definition(raw.encode())
    assert len(str(refused.value)) < 1000


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(AdapterRefusedError, match="cannot be read"):
        parse_definition(b"a: \xff\xfe\x00")


@pytest.mark.parametrize(
    ("transformation", "named"),
    [
        ("{type: sum, input_path: []}", "no such transformation"),
        ("{type: [nest], input_path: []}", "no such transformation"),
        ("{type: nest, field_name: a}", "transformations[0].input_path"),
        ("{type: nest, input_path: [], field_name: a, colour: red}", "transformations[0].colour"),
        ("{type: nest, input_path: []}", "transformations[0].field_name = None"),
        ("{type: nest, input_path: a, field_name: b}", "transformations[0].input_path"),
        ("{type: nest, input_path: [true], field_name: b}", "transformations[0].input_path"),
        ("{type: explode, input_path: [], target_field: [a]}", "transformations[0].target_field"),
        ("{type: drop_duplicates, input_path: [], target_fields: a}", "transformations[0].target_fields"),
        ("{type: project, input_path: [], retained_fields: a}", "transformations[0].retained_fields"),
        ("{type: project, input_path: [], retained_fields: {a: 1}}", "transformations[0].retained_fields"),
        ("{type: merge_spans, input_path: [], group_fields: [a], begin_field: b}", "transformations[0].end_field"),
        ("{type: likelihood, input_path: []}", "transformations[0].categories_to_values"),
        ("{type: likelihood, input_path: [], categories_to_values: {a: x}}", "categories_to_values"),
        ("{type: likelihood, input_path: [], categories_to_values: {a: .inf}}", "categories_to_values"),
        (f"{{type: likelihood, input_path: [], categories_to_values: {{a: 1{'0' * 400}}}}}", "categories_to_values"),
        ("{type: likelihood, input_path: [], categories_to_values: {1: 0, '1': 1}}", "stands twice"),
        ("{type: likelihood, input_path: [], categories_to_values: {'': 0}}", "empty"),
        ("{type: decode_sentences, input_path: [a], source: title, output_names: {text: t}}", "source = 'title'"),
        ("{type: decode_sentences, input_path: [a], source: documents, output_names: {text: t}}", "tags nothing"),
        (
            "{type: decode_sentences, input_path: [a], source: [documents, last_message], output_names: {text: t}}",
            "numbers of their own",
        ),
        (
            "{type: decode_sentences, input_path: [a], source: last_message, output_names: {document_id: d}}",
            "output_names",
        ),
    ],
)
def test_a_transformation_is_refused_by_name(transformation: str, named: str) -> None:
    with pytest.raises(AdapterRefusedError) as refused:
        parse_definition(f"model: ~\nresponse_format: ~\ntransformations: [{transformation}]\n".encode())
    assert named in str(refused.value)

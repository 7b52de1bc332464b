"""Forms become grammars, and what is wrong with one is told by its place."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_serve.errors import AloraServeError, InvalidRequestError, UnimplementedFeatureError
from alora_serve.kv.tenancy import NO_TENANT
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.structure import compiler as compiling
from alora_serve.model.structure.compiler import CompiledForm, FormCompiler
from alora_serve.model.structure.constraint import Constraint, FormUsedUpError
from alora_serve.model.structure.vocabulary import TokenVocabulary
from alora_serve.types import Choice, Grammar, JsonSchema, Regex, StructuredOutput
from held_forms import COMPILER, END, TOKENIZER, VOCABULARY, allowed, holds, refusal, schema
from small_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

# --- what is refused --------------------------------------------------------------------------------------------------

UNSUPPORTED = {
    "not": {},
    "if": {},
    "contains": {},
    "minContains": 1,
    "propertyNames": {},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "dependencies": {"a": ["b"]},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "uniqueItems": True,
    "$dynamicRef": "#a",
    "$recursiveRef": "#",
}
PLACES = {
    "/": lambda inner: inner,
    "/properties/a~1b": lambda inner: {"properties": {"a/b": inner}},
    "/items": lambda inner: {"type": "array", "items": inner},
    "/anyOf/1": lambda inner: {"anyOf": [{"type": "null"}, inner]},
    "/properties/not/prefixItems/0": lambda inner: {"properties": {"not": {"prefixItems": [inner]}}},
}


def test_a_keyword_that_asks_for_nothing_is_left_out() -> None:
    listed = schema(type="array", items={"enum": [1, 2]}, uniqueItems=False)
    assert holds(listed, "[1,1]")
    assert holds(schema(const={"uniqueItems": False}), '{"uniqueItems":false}')


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_a_keyword_that_is_not_held_to_is_named_with_its_place(keyword: str, place: str) -> None:
    error = refusal(schema(**PLACES[place]({keyword: UNSUPPORTED[keyword]})))
    assert f"{keyword!r} at {place} is not supported" in str(error)
    assert [violation.field for violation in error.violations] == ["sampling.structured_output.json_schema"]


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        (schema(type="strin"), "strin"),
        (schema(type="string", format="nonsense"), "Unknown format: nonsense"),
        (schema(type="string", pattern="(a"), "unclosed group"),
        (schema(minimum=3, maximum=1, type="integer"), "minimum (3) is greater than maximum (1)"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        (schema(oneOf=[{"type": "string"}, {"maxLength": 3, "type": "string"}]), "use 'anyOf'"),
        (schema(type="object", minProperties=2), "'minProperties' at /"),
        (schema(properties={"a": {"minProperties": 3, "required": ["b"]}}), "'minProperties' at /properties/a"),
        (schema(const="a\x01"), "'const' at / is not supported with control characters"),
        (schema(const={"a": ["b", {"\x7f": 1}]}), "'const' at / is not supported with control characters"),
        (schema(items={"enum": ["yes", "no\x0b"]}), "'enum' at /items is not supported with control characters"),
        (schema(properties={"a\x1fb": {}}), "'properties' at / is not supported with control characters"),
        (schema(required=["\x00"]), "'required' at / is not supported with control characters"),
        (schema(enum=[3, -9007199254740993]), "'enum' at / is not supported with an integer beyond 9007199254740992"),
        (
            schema(properties={"a": {"pattern": "(?ix)a #["}}),
            "the flag 'x' is not supported in a pattern at /properties/a",
        ),
        (JsonSchema("false"), "allows no answer"),
        (JsonSchema(r'{"const": "\ud800"}'), "is not JSON"),
        (JsonSchema('{"maximum": 1e999}'), "is not JSON"),
        (Regex("a{2}(?!b)"), "look-around"),
        (Regex(r"(a)\1"), "backreferences"),
        (Grammar("start: word"), "word"),
        (Grammar('start: "a'), "lexer error"),
        (Grammar('start: %json {"const": ' + "1" * 4301 + "}"), "grammar: a schema in it cannot be read: "),
        (Grammar('start: again\nagain: again "a"'), "allows no answer"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(form: Any, complaint: str) -> None:
    error = refusal(form if not isinstance(form, dict) else JsonSchema(json.dumps(form)))
    assert complaint in str(error)
    assert "<non-verbose" not in str(error)
    assert "\n" not in str(error)


def test_a_schema_may_not_switch_off_what_refuses_it() -> None:
    guidance = {"lenient": True, "whitespace_pattern": " *", "coerce_one_of": True, "json_allowed_escapes": "u"}
    assert "'not' at /" in str(refusal(schema(**{"x-guidance": guidance, "not": {}})))
    assert not holds(schema(**{"x-guidance": guidance}, type="array"), "[  ]")


# --- what is held to --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (JsonSchema("true"), ["{}", "[1, 2]", '"a"', "null"], ["", "{", "nul", "{}}"]),
        (schema(oneOf=[{"type": "string"}, {"type": "integer"}]), ['"a"', "3"], ["true"]),
        (schema(type="object", required=["a"], minProperties=2), ['{"a":1,"b":2}'], ["{}", '{"a":1}']),
        (schema(type="array", maxItems=2), ["[]", "[ 1 , 2 ]"], ["[  1]", "[1,\n2]", "[1,2,3]", " []", "[] "]),
        (schema(type="object", additionalProperties=False), ["{}", "{ }"], ['{"a": 1}']),
        (
            schema(type="object", properties={"a": {"type": "integer"}}),
            ['{"a": 1}', '{"b": "x"}'],
            ['{"a": "x"}', r'{"\u0061": "x"}', '{"b": 1, "a": "x"}'],
        ),
        (schema(type="integer", multipleOf=7), ["0", "21", "-7"], ["20", "1"]),
        (
            JsonSchema('{"$defs": {"a/b": {"enum": [1, 2]}}, "type": "array", "items": {"$ref": "#/$defs/a~1b"}}'),
            ["[]", "[1, 2]"],
            ["[3]", '["1"]'],
        ),
        (
            JsonSchema('{"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": false}'),
            ["{}", '{"a": {"a": {}}}'],
            ['{"a": 1}', '{"a": {"b": {}}}'],
        ),
        (
            schema(allOf=[{"type": "integer", "minimum": 3}, {"maximum": 5}]),
            ["3", "5"],
            ["2", "6", '"4"'],
        ),
        (
            schema(type="object", patternProperties={"^x[0-9]$": {"type": "integer"}}, additionalProperties=False),
            ["{}", '{"x1": 1, "x2": 2}'],
            ['{"x1": "a"}', '{"y1": 1}'],
        ),
        (schema(enum=["\b\t\n\f\r", 9007199254740992]), [r'"\b\t\n\f\r"', "9007199254740992"], [r'"\u0008\t\n\f\r"']),
        (schema(const={"\n": None}), [r'{"\n":null}'], ['{"":null}']),
        (schema(type="string"), [r'"\n\"\\"', '"é😀"'], [r'"\u0041"', r'"\ud800"', '"\n"']),
        (Regex("a|bc"), ["a", "bc"], ["", "ab", "abc", "b"]),
        (Choice(("a.c", "x|y", "[é]\n", "😀")), ["a.c", "x|y", "[é]\n", "😀"], ["abc", "x", "y", "a.cx"]),
        (Grammar('start: "(" start ")" | "x"'), ["x", "((x))"], ["(x", "x)", "()"]),
    ],
)
def test_a_form_takes_what_it_should_and_nothing_else(form: StructuredOutput, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not holds(form, text)] == []
    assert [text for text in bad if holds(form, text)] == []


FORMATS = {
    "date": (
        ["2024-02-29", "2000-02-29", "2023-04-30", "0001-12-31"],
        ["2023-02-29", "1900-02-29", "2023-04-31", "2023-13-01", "2023-1-1", "0000-01-01", "2023-01-01 "],
    ),
    "time": (
        ["00:00:00Z", "23:59:59.25+01:00", "12:00:00z"],
        ["24:00:00Z", "12:60:00Z", "12:00:60Z", "12:00:00", "12:00Z", "12:00:00+24:00"],
    ),
    "date-time": (
        ["2024-02-29T12:00:00Z", "2023-01-01t00:00:00.5-08:00"],
        ["2023-02-29T12:00:00Z", "2023-01-01T12:00:60Z", "2023-01-01 12:00:00Z", "2023-01-01", "2023-01-01T12:00:00"],
    ),
    "duration": (["P1Y2M3D", "PT36H", "P2W", "P1DT1M"], ["P", "1D", "P1S", "PT", "P1W1D"]),
    "email": (["a.b+c@example.org", "a@[127.0.0.1]"], ["a", "@b", "a@", "a b@c", "a@b@c", "a@-b"]),
    "hostname": (["a", "a-1.example"], ["-a", "a-", "a..b", "a_b", "", "a" * 64]),
    "ipv4": (["0.0.0.0", "255.10.9.1"], ["256.0.0.1", "1.2.3", "01.2.3.4", "1.2.3.4.5"]),
    "ipv6": (["::", "::1", "1:2:3:4:5:6:7:8", "fe80::a:b"], [":", "1::2::3", "1:2:3:4:5:6:7:8:9", "g::", "12345::"]),
    "uuid": (["0123abCD-0123-4567-89ab-0123456789ab"], ["0123abcd0123456789ab0123456789ab", "g" * 36, "-" * 36]),
    "uri": (["https://a.example:80/b?c=%20#d", "urn:a:b"], ["a", "https://a b", "https://a/%2", "a:\\b", "://a"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_takes_what_there_is_of_it_and_nothing_else(name: str) -> None:
    good, bad = FORMATS[name]
    form = schema(type="string", format=name)
    assert [text for text in good if not holds(form, json.dumps(text))] == []
    assert [text for text in bad if holds(form, json.dumps(text))] == []


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize("bound", [2**53 - 1, 2**53 + 1, -(2**53) - 1, 2**56 + 9, 2**63 - 1])
@pytest.mark.parametrize(
    ("keyword", "fits"),
    [
        ("minimum", operator.ge),
        ("maximum", operator.le),
        ("exclusiveMinimum", operator.gt),
        ("exclusiveMaximum", operator.lt),
    ],
)
def test_bounds_are_held_to_where_floats_have_not_every_integer(
    keyword: str, fits: Callable[[int, int], bool], bound: int, kind: str
) -> None:
    try:
        COMPILER.compile(form := schema(type=kind, **{keyword: bound}))
    except InvalidRequestError:  # llguidance does not count so far
        assert bound == 2**63 - 1
        return
    near = [bound + step for step in (-1025, -17, -2, -1, 0, 1, 2, 17, 1025)]
    taken = [number for number in near if holds(form, str(number))]
    assert [number for number in taken if not fits(number, bound)] == []
    assert taken


def test_a_format_adds_to_what_else_a_schema_says() -> None:
    form = schema(properties={"a": {"format": "date", "allOf": [{"pattern": "^2"}], "pattern": "9$"}}, required=["a"])
    assert holds(form, '{"a": "2024-02-29"}')
    assert holds(form, '{"a": 3}'), "a format is one of strings"
    assert [day for day in ("2023-02-29", "1999-01-29", "2024-02-28") if holds(form, json.dumps({"a": day}))] == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4, unique=True), st.text(max_size=6))
def test_choices_are_taken_letter_by_letter(values: list[str], other: str) -> None:
    form = Choice(tuple(values))
    assert all(holds(form, value) for value in values)
    assert holds(form, other) == (other in values)


def test_many_choices_are_taken() -> None:
    form = Choice(tuple(f"answer {index}" for index in range(1024)))
    assert holds(form, "answer 1023")
    assert not holds(form, "answer 1024")


# --- compiled once ----------------------------------------------------------------------------------------------------


def test_a_form_is_compiled_once_and_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_COMPILED", 2)
    compiler = FormCompiler(VOCABULARY)
    first = compiler.compile(Regex("a"))
    assert compiler.compile(Regex("a")) is first
    compiler.compile(Regex("b"))
    assert compiler.compile(Regex("a")) is first
    compiler.compile(Regex("c"))
    assert compiler.compile(Regex("a")) is first, "the least recently used goes first"
    compiler.compile(Regex("d"))
    compiler.compile(Regex("e"))
    assert compiler.compile(Regex("a")) is not first


def test_how_soon_a_form_is_there_tells_a_tenant_nothing_of_another() -> None:
    compiler = FormCompiler(VOCABULARY)
    first = compiler.compile(Regex("a"), b"acme")
    for other in (b"beta", NO_TENANT):
        assert compiler.compile(Regex("a"), other) is not first
    assert compiler.compile(Regex("a"), b"acme") is first
    renewed = first.renewed()
    assert renewed is not first
    assert renewed.tenant_salt == b"acme"
    assert compiler.compile(Regex("a"), b"acme") is renewed
    assert first.renewed() is renewed, "whoever comes first compiles for all"
    assert renewed.alone() is not renewed
    assert compiler.compile(Regex("a"), b"acme") is renewed, "what is one answer's alone is not kept"


DEEP = """
import json
from alora_serve.errors import InvalidRequestError
from alora_serve.types import Grammar, JsonSchema
from held_forms import holds, refusal

def chain(last):
    links = {f"d{index}": {"items": {"$ref": f"#/$defs/d{index + 1}"}} for index in range(2500)}
    return JsonSchema(json.dumps({"$ref": "#/$defs/d0", "$defs": {**links, "d2500": last}}))

assert holds(chain({}), "[]")
assert "strin" in str(refusal(chain({"type": "strin"})))
for rule in "rT":
    rules = [f"start: {rule}0", *(f"{rule}{index}: {rule}{index + 1}" for index in range(6000)), f'{rule}6000: "a"']
    assert holds(Grammar("\\n".join(rules)), "a")
"""


def test_what_nests_deeper_than_a_usual_stack_ends_no_process() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", DEEP], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


ENDLESS = """
import resource
from alora_serve.types import Grammar, Regex
from held_forms import holds

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (768 << 20)  # 256 of them are the stack on which forms are compiled
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
word = "abcdefghij" * 500
for form in (
    Grammar(f'start: "{word}" start "b"'),
    Grammar(f'root ::= "{word}" root "b"'),
    Grammar(f'start: a{{1000}}\\na: b{{1000}}\\nb: "{word}"'),
    Grammar(f'start: "{word}" start "b"\\n%llguidance {{"no_forcing": false}}'),
    Regex(f"({word}){{1000}}"),
):
    assert not holds(form, word)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system bounds memory on Linux alone")
def test_text_that_an_answer_must_have_without_end_takes_no_memory() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", ENDLESS], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def follow(compiler: FormCompiler, form: StructuredOutput, text: str) -> Constraint:
    constraint = Constraint(compiler.compile(form), frozenset([END]))
    for token in VOCABULARY.tokens.greedy_tokenize(text):
        assert allowed(constraint, token)
        constraint.push(token)
    return constraint


FEW_STATES = compiling.LLParserLimits(max_lexer_states=70, verbose_errors=False)
BRANCHES = Regex("[a-j]{40}|[k-t]{40}|[0-9]{40}")
"""Each branch takes some 40 lexer states: one compiled form has room for one answer, and for none of another branch."""


def count_compiled(monkeypatch: pytest.MonkeyPatch) -> list[StructuredOutput]:
    compiled: list[StructuredOutput] = []
    compile_one = FormCompiler._compile

    def note(compiler: FormCompiler, form: StructuredOutput, tenant_salt: bytes) -> CompiledForm:
        compiled.append(form)
        return compile_one(compiler, form, tenant_salt)

    monkeypatch.setattr(FormCompiler, "_compile", note)
    return compiled


def test_what_other_answers_used_up_of_a_forms_limits_is_no_answers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_LIMITS", FEW_STATES)
    compiler = FormCompiler(VOCABULARY)
    first = compiler.compile(BRANCHES)
    for text in ("aj" * 20, "kt" * 20, "09" * 20, "ja" * 20):
        assert follow(compiler, BRANCHES, text).is_complete
    assert compiler.compile(BRANCHES) is not first


def whose_form_others_used_up(monkeypatch: pytest.MonkeyPatch, count: int) -> list[Constraint]:
    """Answers that have not begun, of one form, whose limits others have used up since."""
    monkeypatch.setattr(compiling, "_LIMITS", FEW_STATES)
    compiler = FormCompiler(VOCABULARY)
    late = [Constraint(compiler.compile(BRANCHES), frozenset([END])) for _ in range(count)]
    for text in ("aj" * 20, "kt" * 20):
        assert follow(compiler, BRANCHES, text).is_complete
    return late


def test_neither_a_token_nor_a_mask_waits_for_a_form_to_be_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are between two tokens of everybody's."""
    (late,) = whose_form_others_used_up(monkeypatch, 1)
    compiled = count_compiled(monkeypatch)
    tokens = VOCABULARY.tokens.greedy_tokenize("09" * 20)
    for token in tokens[:-1]:
        late.push(token)
    for _ in range(2):
        with pytest.raises(FormUsedUpError):
            late.mask()
    assert compiled == []
    assert allowed(late, tokens[-1])
    assert compiled == [BRANCHES]
    late.push(tokens[-1])
    assert late.is_complete


def test_a_form_that_many_answers_find_used_up_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    late = whose_form_others_used_up(monkeypatch, 5)
    compiled = count_compiled(monkeypatch)
    tokens = VOCABULARY.tokens.greedy_tokenize("09" * 20)
    for constraint in late:
        for token in tokens[:-1]:
            constraint.push(token)
        assert allowed(constraint, tokens[-1])
    assert compiled == [BRANCHES]


def test_answers_that_use_up_each_others_renewed_form_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_LIMITS", FEW_STATES)
    compiler = FormCompiler(VOCABULARY)
    texts = [VOCABULARY.tokens.greedy_tokenize(text) for text in ("aj" * 20, "kt" * 20, "09" * 20)]
    answers = [Constraint(compiler.compile(BRANCHES), frozenset([END])) for _ in texts]
    compiled = count_compiled(monkeypatch)
    for step in range(max(map(len, texts))):
        for answer, tokens in zip(answers, texts, strict=True):
            if step < len(tokens):
                assert allowed(answer, tokens[step])
                answer.push(tokens[step])
    assert all(answer.is_complete for answer in answers)
    assert 2 <= len(compiled) <= 3 * len(answers)


def test_an_answer_taken_up_again_has_its_form_compiled_anew_where_it_is_used_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (late,) = whose_form_others_used_up(monkeypatch, 1)
    compiled = count_compiled(monkeypatch)
    late.restore(VOCABULARY.tokens.greedy_tokenize("09" * 20))
    assert late.is_complete
    assert compiled == [BRANCHES]


@pytest.mark.parametrize("text", ["z", "abz", "abcz"])
def test_tokens_that_do_not_have_the_form_are_refused_without_compiling_it_anew(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """That may take a minute."""
    compiler, form = FormCompiler(VOCABULARY), Regex("abc")
    compiled = count_compiled(monkeypatch)
    constraint = Constraint(compiler.compile(form), frozenset([END]))
    with pytest.raises(InvalidRequestError, match=r"resume\.generated_token_ids"):
        constraint.restore(VOCABULARY.tokens.greedy_tokenize(text))
    Constraint(compiler.compile(form), frozenset([END])).restore([*VOCABULARY.tokens.greedy_tokenize("abc"), END])
    assert compiled == [form]


def test_where_a_stop_string_may_end_an_answer_is_the_same_once_its_form_is_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = Regex("[a-j]{1,40}|[k-t]{40}|[0-9]{1,40}")
    free = Constraint(FormCompiler(VOCABULARY).compile(form), frozenset([END]))
    monkeypatch.setattr(compiling, "_LIMITS", FEW_STATES)
    compiler = FormCompiler(VOCABULARY)
    late = Constraint(compiler.compile(form), frozenset([END]))
    for text in ("aj" * 20, "kt" * 20):
        follow(compiler, form, text)
    for constraint in (free, late):
        for token in VOCABULARY.tokens.greedy_tokenize("0909"):
            assert allowed(constraint, token)
            constraint.push(token)
        constraint.advance("0909")
        assert allowed(constraint, END)
        assert constraint.may_end("0")
        assert not constraint.may_end("a")


@pytest.mark.parametrize("call", ["restore", "push", "mask", "patient_mask", "is_complete", "advance", "may_end"])
def test_whatever_fails_in_llguidance_is_an_error_of_the_answer(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it: no Exception."""

    def panic(*_: object) -> NoReturn:
        raise PanicException("index out of bounds")

    matcher = SimpleNamespace(
        consume_tokens=panic,
        validate_tokens=panic,
        compute_bitmask=panic,
        is_stopped=panic,
        is_accepting=panic,
        deep_copy=panic,
    )
    monkeypatch.setattr(CompiledForm, "matcher", lambda form: matcher)
    constraint = Constraint(COMPILER.compile(Regex("a")), frozenset([END]))
    calls = {
        "restore": lambda: constraint.restore([1]),
        "push": lambda: constraint.push(1),
        "mask": constraint.mask,
        "patient_mask": constraint.patient_mask,
        "is_complete": lambda: constraint.is_complete,
        "advance": lambda: constraint.advance("a"),
        "may_end": lambda: constraint.may_end("a"),
    }
    with pytest.raises(AloraServeError, match="cannot be followed: PanicException"):
        calls[call]()


def test_an_answer_that_needs_more_than_the_limits_by_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_LIMITS", compiling.LLParserLimits(max_lexer_states=70, verbose_errors=False))
    with pytest.raises(InvalidRequestError, match=r"sampling\.structured_output\.regex: .*(?i:complex|states)"):
        follow(FormCompiler(VOCABULARY), Regex("[a-z]{1,500}"), "az" * 100)


# --- vocabularies -----------------------------------------------------------------------------------------------------


def test_token_bytes_are_those_of_the_text_and_special_tokens_have_names() -> None:
    text = "Ärger 数字 😀"
    tokens = VOCABULARY.tokens.greedy_tokenize(text)
    assert b"".join(map(VOCABULARY.token_bytes, tokens)).decode() == text
    assert VOCABULARY.token_bytes(END) == b"<|im_end|>"
    assert VOCABULARY.token_bytes(VOCABULARY.size - 1) == b"", "a row of padding"


def test_padding_and_special_tokens_are_never_part_of_an_answer() -> None:
    constraint = Constraint(COMPILER.compile(Regex("(?s:.)*")), frozenset([END]))
    assert allowed(constraint, END)
    assert not any(allowed(constraint, token) for token in range(TOKENIZER.vocabulary_size, VOCABULARY.size))
    others = [token for token in range(TOKENIZER.vocabulary_size) if TOKENIZER.decode([token]) == "" and token != END]
    assert others
    assert not any(allowed(constraint, token) for token in others)


def test_a_model_without_an_end_of_sequence_keeps_all_its_tokens() -> None:
    tokenizer = ChatTokenizer(byte_level_tokenizer(None))
    assert not tokenizer.end_of_sequence_ids
    vocabulary = TokenVocabulary(tokenizer, tokenizer.vocabulary_size)
    letters = range(tokenizer.vocabulary_size - 20)
    letters = [token for token in letters if (text := tokenizer.decode([token])).isascii() and text.isalpha()]
    assert len(letters) > 60
    constraint = Constraint(FormCompiler(vocabulary).compile(Regex(".{1,100}")), frozenset())
    assert all(allowed(constraint, token) for token in letters)
    constraint.push(letters[0])
    assert len(constraint.mask()) * 8 >= tokenizer.vocabulary_size
    done = Constraint(FormCompiler(vocabulary).compile(Regex("a{0}")), frozenset())
    with pytest.raises(InvalidRequestError, match="no token of this model"):
        done.mask()


def test_a_tokenizer_that_falls_back_to_bytes_is_served() -> None:
    tokenizer = ChatTokenizer(byte_fallback_tokenizer())
    vocabulary = TokenVocabulary(tokenizer, tokenizer.vocabulary_size)
    constraint = Constraint(FormCompiler(vocabulary).compile(Choice(("数字 x",))), tokenizer.end_of_sequence_ids)
    tokens = vocabulary.tokens.greedy_tokenize("数字 x")
    for token in tokens:
        assert allowed(constraint, token)
        constraint.push(token)
    assert constraint.is_complete
    assert tokenizer.decode(tokens) == "数字 x"


def test_a_tokenizer_without_bytes_takes_no_forms_and_still_spells_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("can't determine decoder type")

    monkeypatch.setattr("alora_serve.model.structure.vocabulary.LLTokenizer", refuse)
    vocabulary = TokenVocabulary(TOKENIZER, TOKENIZER.vocabulary_size)
    with pytest.raises(UnimplementedFeatureError, match=r"sampling\.structured_output"):
        FormCompiler(vocabulary).compile(Regex("a"))
    assert vocabulary.token_bytes(END) == b"<|im_end|>"

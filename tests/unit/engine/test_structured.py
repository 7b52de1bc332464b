"""Answers bound to a form: whole where they end by themselves, the same in any batch and from any cut."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alora_serve.engine.core import CoreOptions
from alora_serve.errors import AloraServeError, InvalidRequestError, StepFailedError
from alora_serve.model.loader import BaseModel
from alora_serve.model.runner import ModelRunner
from alora_serve.model.structure import compiler as compiling
from alora_serve.model.structure.compiler import CompiledForm
from alora_serve.model.structure.constraint import Constraint, FormUsedUpError
from alora_serve.model.text import TextStream
from alora_serve.types import (
    ChatMessage,
    Choice,
    FinishReason,
    GenerateRequest,
    Grammar,
    JsonSchema,
    PrefillResult,
    Prompt,
    Regex,
    Resume,
    SamplingParams,
    StructuredOutput,
)
from in_process import Answer, MemoryStore, Stack, open_stack

PATIENCE_SECONDS = 60.0
PROMPT = Prompt((ChatMessage("user", "What do you see?"),))
ADAPTERS = ("", "appended", "generation-prompt", "lora")
FORMAT_CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
FORMATS = ("date", "email", "ipv4", "ipv6", "uuid")
"""Those that the checker knows. Without it, formats are annotations to ``jsonschema``."""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b/c", 'd"']}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture
async def stack(model: BaseModel, adapters: Path) -> AsyncIterator[Stack]:
    async with open_stack(model, MemoryStore(), adapters) as stack:
        yield stack


@pytest.fixture
async def prefilled(stack: Stack) -> PrefillResult:
    return await stack.prefill(PROMPT)


async def bound(
    stack: Stack, prefilled: PrefillResult, form: StructuredOutput | None, adapter: str = "", **sampling: Any
) -> Answer:
    """An answer of that form, or a free one of a few tokens."""
    given = {"max_tokens": 120 if form else 12, "ignore_eos": form is None, "structured_output": form, **sampling}
    return await stack.generate(prefilled.handle, adapter, **given)


def json_schema(schema: Any) -> JsonSchema:
    return JsonSchema(json.dumps(schema))


# --- JSON schemas -----------------------------------------------------------------------------------------------------

names = st.text(st.sampled_from('ab"\\/ é😀$\n\t'), min_size=1, max_size=4)
values = st.none() | st.booleans() | st.integers(-99, 99) | names
lengths = st.tuples(st.integers(0, 3), st.integers(0, 4)).map(lambda pair: (pair[0], pair[0] + pair[1]))
class_parts = [
    "!-~",
    "\\x20-\\x7e",
    "\\x00-\\x1f",
    "\x0b-\x1f",
    "\\x01",
    "\\x7f",
    '"',
    "\\\\",
    "\\n",
    "é",
    "\\]",
    "0-9",
]
patterns = st.tuples(
    st.sampled_from(["[a", "[^"]), st.lists(st.sampled_from(class_parts), min_size=1, max_size=3), st.sampled_from("12")
).map(lambda parts: f"^{parts[0]}{''.join(parts[1])}]{{{parts[2]}}}$")
leaves = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "integer"}, {"type": ["string", "null"], "maxLength": 2}]),
    st.tuples(st.integers(-50, 50), st.integers(0, 99)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.integers(1, 7).map(lambda step: {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 60}),
    st.sampled_from([0.5, 0.25, 2.5, 7.0]).map(lambda step: {"type": "number", "multipleOf": step}),
    st.integers(-3, 3).map(lambda low: {"type": "number", "exclusiveMinimum": low, "maximum": low + 1.5}),
    st.tuples(st.floats(-3, 3), st.floats(0.001, 3)).map(
        lambda pair: {"type": "number", "exclusiveMinimum": pair[0], "exclusiveMaximum": pair[0] + pair[1]}
    ),
    lengths.map(lambda pair: {"type": "string", "minLength": pair[0], "maxLength": pair[1]}),
    st.sampled_from(["^[a-c]{1,3}$", "^(yes|no)$", "^[^ ]$"]).map(lambda regex: {"type": "string", "pattern": regex}),
    patterns.map(lambda regex: {"type": "string", "pattern": regex}),
    st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name, "maxLength": 40}),
    st.lists(values, min_size=1, max_size=3, unique_by=repr).map(lambda members: {"enum": members}),
    values.map(lambda value: {"const": value}),
    st.text(st.sampled_from("a\x01\x0b\x1f\x7f"), min_size=1, max_size=2).map(lambda text: {"const": text}),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(names, inner, max_size=3)
    return st.one_of(
        st.tuples(properties, st.booleans(), st.booleans()).map(
            lambda parts: {
                "type": "object",
                "properties": parts[0],
                "required": list(parts[0]) if parts[1] else list(parts[0])[:1],
                "additionalProperties": False if parts[2] else {"type": "boolean"},
            }
        ),
        st.tuples(inner, lengths).map(
            lambda parts: {"type": "array", "items": parts[0], "minItems": parts[1][0], "maxItems": parts[1][1]}
        ),
        st.lists(inner, min_size=1, max_size=2).map(
            lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda either: {"anyOf": either}),
        st.tuples(properties, inner).map(
            lambda parts: {
                "type": "object",
                "properties": parts[0],
                "patternProperties": {"^x[0-9]$": parts[1], '^y[^"]$': parts[1]},
                "additionalProperties": False,
            }
        ),
        st.tuples(properties, properties).map(
            lambda parts: {
                "allOf": [
                    {"type": "object", "properties": parts[0]},
                    {"properties": {f"{name}2": schema for name, schema in parts[1].items()}},
                ],
                "required": list(parts[0])[:1],
            }
        ),
    )


inline = st.recursive(leaves, containers, max_leaves=5)
schemas = inline | inline.map(
    lambda schema: {
        "$defs": {"a/b": schema},
        "type": "array",
        "prefixItems": [{"$ref": "#/$defs/a~1b"}],
        "items": {"$ref": "#/$defs/a~1b"},
        "minItems": 1,
        "maxItems": 2,
    }
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    st.lists(st.tuples(schemas, st.sampled_from(ADAPTERS), st.sampled_from([0.0, 1.0])), min_size=20, max_size=20),
    st.integers(0, 2**32),
)
def test_an_answer_that_stops_parses_and_validates(
    model: BaseModel, adapters: Path, asked: list[tuple[Any, str, float]], seed: int
) -> None:
    """200 schemas, 20 at a time in one batch, each with the base model or some adapter."""

    async def run() -> list[Answer | BaseException]:
        async with open_stack(model, MemoryStore(), adapters) as stack:
            prefilled = await stack.prefill(PROMPT)
            return await asyncio.gather(
                *(
                    bound(stack, prefilled, json_schema(schema), name, temperature=heat, seed=seed, sample_index=index)
                    for index, (schema, name, heat) in enumerate(asked)
                ),
                return_exceptions=True,
            )

    stopped = 0
    for (schema, _, _), answer in zip(asked, asyncio.run(run()), strict=True):
        if not isinstance(answer, Answer):
            assert isinstance(answer, InvalidRequestError)
            assert "'const' at" in str(answer)
            assert "control characters" in str(answer)
        elif answer.finished.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(answer.text), schema, format_checker=FORMAT_CHECKER)
            stopped += 1
        else:
            assert len(answer.tokens) == 120
    assert stopped >= 5


@pytest.mark.parametrize("adapter", ADAPTERS)
async def test_a_bound_answer_is_the_schemas_whole_and_ends_by_itself(
    stack: Stack, prefilled: PrefillResult, adapter: str
) -> None:
    answer = await bound(stack, prefilled, json_schema(PERSON), adapter)
    assert answer.finished.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(answer.text), PERSON)
    # Nothing can follow a closed object: no step is spent on an end of sequence.
    assert answer.text.endswith("}")
    assert model_text(stack, answer.tokens) == answer.text


def model_text(stack: Stack, tokens: tuple[int, ...]) -> str:
    return stack.core.model.tokenizer.decode(tokens)


async def test_an_answer_cut_off_says_so(stack: Stack, prefilled: PrefillResult) -> None:
    answer = await bound(stack, prefilled, json_schema(PERSON), max_tokens=5)
    assert answer.finished.finish_reason is FinishReason.LENGTH
    assert len(answer.tokens) == 5


async def test_white_space_between_parts_is_at_most_one_space(stack: Stack, prefilled: PrefillResult) -> None:
    """Though the model wants nothing else: 32 is the space, 198 the line end of this tokenizer's alphabet."""
    spaces = {token: 100.0 for token in range(256) if model_text(stack, (token,)) in (" ", "\n", "\t", "\r")}
    assert len(spaces) == 4
    answer = await bound(
        stack,
        prefilled,
        json_schema({"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}),
        logit_bias=spaces,
    )
    assert answer.finished.finish_reason is FinishReason.STOP
    assert "[ " in answer.text
    assert not re.search(r"\s\s|[\n\t\r]", answer.text)


# --- other forms ------------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[StructuredOutput, str]] = {
    "regex": (Regex(r"[a-f]{2,4}-[0-9]{2}"), r"[a-f]{2,4}-[0-9]{2}"),
    "choice": (Choice(("yes", "no", "n/a: [éé] 😀")), r"yes|no|n/a: \[éé\] 😀"),
    "prefixes": (Choice(("a", "ab", "abc")), "a|ab|abc"),
    "grammar": (Grammar('start: "(" start ")" | WORD\nWORD: /[xy]{1,2}/'), r"\(*[xy]{1,2}\)*"),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", FORMS)
async def test_every_form_is_held_to(stack: Stack, prefilled: PrefillResult, name: str, temperature: float) -> None:
    form, expected = FORMS[name]
    answers = await asyncio.gather(
        *(
            bound(stack, prefilled, form, adapter, temperature=temperature, seed=seed, top_k=seed * 5, top_p=0.9)
            for seed in range(4)
            for adapter in ADAPTERS
        )
    )
    for answer in answers:
        if answer.finished.finish_reason is FinishReason.STOP:
            assert re.fullmatch(expected, answer.text)
            assert name != "grammar" or answer.text.count("(") == answer.text.count(")")
    assert any(answer.finished.finish_reason is FinishReason.STOP for answer in answers)


async def test_bias_and_penalties_choose_among_what_the_form_allows(stack: Stack, prefilled: PrefillResult) -> None:
    [a, b] = [next(t for t in range(256) if model_text(stack, (t,)) == letter) for letter in "ab"]
    form = Regex("[ab]{6}")
    only_a = await bound(stack, prefilled, form, logit_bias={a: 100.0, a + 9: 100.0})
    assert only_a.text == "aaaaaa"
    alternating = await bound(stack, prefilled, form, logit_bias={a: 50.0, b: 50.0}, frequency_penalty=2.0)
    assert set(alternating.text) == {"a", "b"}
    never = await bound(stack, prefilled, form, logit_bias={a: -100.0}, temperature=1.0, seed=1, repetition_penalty=1.5)
    assert never.text == "bbbbbb"


async def test_an_end_of_sequence_comes_only_where_the_answer_is_whole(stack: Stack, prefilled: PrefillResult) -> None:
    """The model wants to end at once, and may only after the third letter; a stop token ends it there, too."""
    [end] = stack.core.model.tokenizer.end_of_sequence_ids
    by_end = await bound(stack, prefilled, Regex("[ab]{3,9}"), logit_bias={end: 100.0})
    assert (len(by_end.text), by_end.tokens[-1], by_end.finished.finish_reason) == (3, end, FinishReason.STOP)
    assert re.fullmatch("[ab]{3}", by_end.text)
    stop = next(t for t in range(256) if model_text(stack, (t,)) == "!")
    wish = {"logit_bias": {end: -100.0, stop: 100.0}, "stop_token_ids": (stop,), "stop": ("!!",)}
    by_stop = await bound(stack, prefilled, Regex("[ab]{3,9}"), **wish)
    assert (by_stop.tokens[-1], by_stop.finished.finish_reason) == (stop, FinishReason.STOP)
    assert len(by_stop.tokens) == 4
    assert re.fullmatch("[ab]{3}", by_stop.text), "the stop token is no part of it"
    resume = Resume(by_stop.tokens, by_stop.started.invocation_start, by_stop.started.adapter_digest)
    again = await bound(stack, prefilled, Regex("[ab]{3,9}"), resume=resume, **wish)
    assert (again.text, again.tokens, again.finished.finish_reason) == ("", (), FinishReason.STOP)


async def test_a_stop_token_is_a_token_like_any_other_until_the_answer_is_whole(
    stack: Stack, prefilled: PrefillResult
) -> None:
    [a, b, brace] = [next(t for t in range(256) if model_text(stack, (t,)) == letter) for letter in "ab}"]
    closed = await bound(stack, prefilled, json_schema(PERSON), stop_token_ids=(brace,))
    assert closed.finished.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(closed.text), PERSON)
    for letters, expected in (("a", "aaa"), ("ab", "bbb")):
        bias = {b: 60.0} if "b" in letters else {}
        ids = tuple({"a": a, "b": b}[letter] for letter in letters)
        ended = await bound(stack, prefilled, Regex("[ab]{3,9}"), stop_token_ids=ids, logit_bias={a: 50.0, **bias})
        assert (ended.text, ended.finished.finish_reason) == (expected, FinishReason.STOP)
        assert ended.tokens == (ids[-1],) * 4


# --- stop strings -----------------------------------------------------------------------------------------------------


async def test_a_stop_string_ends_an_answer_only_where_it_is_whole(stack: Stack, prefilled: PrefillResult) -> None:
    [a, b] = [next(t for t in range(256) if model_text(stack, (t,)) == letter) for letter in "ab"]
    wish = {"logit_bias": {a: 50.0, b: 50.0}, "frequency_penalty": 2.0, "max_tokens": 10}
    free = (await bound(stack, prefilled, Regex("[ab]*"), **wish)).text
    assert len(free) == 10
    stop = next(free[at : at + 2] for at in range(4) if free.find(free[at : at + 2], 5) > 0)
    unbound = await bound(stack, prefilled, Regex("[ab]*"), stop=(stop,), **wish)
    assert (unbound.text, unbound.finished.stop_string) == (free[: free.index(stop)], stop)
    # Of at least five letters: an earlier occurrence is text.
    late = await bound(stack, prefilled, Regex("[ab]{5,}"), stop=(stop,), **wish)
    assert late.finished.stop_string == stop
    assert late.text == free[: free.index(stop, 5)]
    # Of even length only: another one.
    even = await bound(stack, prefilled, Regex("([ab][ab])*"), stop=(stop,), **wish)
    assert len(even.text) % 2 == 0
    never = await bound(stack, prefilled, Regex("[ab]{10}c"), stop=(stop, "c"), **wish)
    assert (never.text, never.finished.finish_reason) == (free, FinishReason.LENGTH)


# --- batches and cuts -------------------------------------------------------------------------------------------------


async def test_bound_and_free_answers_in_one_batch_are_what_they_are_alone(
    stack: Stack, prefilled: PrefillResult
) -> None:
    forms = [None, *(form for form, _ in FORMS.values()), json_schema(PERSON), None]
    asked = [
        (form, adapter, {"temperature": heat, "seed": 5, "sample_index": index, "top_logprobs": index % 3})
        for index, form in enumerate(forms)
        for adapter, heat in (("", 0.0), ("appended", 1.0), ("lora", 0.7))
    ]
    together = await asyncio.gather(*(bound(stack, prefilled, form, name, **rest) for form, name, rest in asked))
    assert stack.metrics.counts["peak running"] > len(asked) / 2
    for (form, name, rest), answer in zip(asked, together, strict=True):
        alone = await bound(stack, prefilled, form, name, **rest)
        assert (alone.tokens, alone.text) == (answer.tokens, answer.text)
        assert alone.finished.finish_reason is answer.finished.finish_reason


@pytest.mark.parametrize("adapter", ["", "appended"])
@pytest.mark.parametrize(
    ("form", "stop"),
    [
        (json_schema(PERSON), {}),
        (FORMS["prefixes"][0], {}),
        (Regex("[a-h]{4,20}"), {"stop": ("a", "b", "c")}),
        (Regex("[!-~]{4,20}"), {"stop_token_ids": tuple(range(0, 256, 2))}),
    ],
    ids=["schema", "prefixes", "stop strings", "stop tokens"],
)
async def test_an_answer_resumed_at_any_cut_is_the_uncut_one(
    stack: Stack, prefilled: PrefillResult, adapter: str, form: StructuredOutput, stop: dict[str, Any]
) -> None:
    sampling = {"temperature": 1.0, "seed": 11, **stop}
    whole = await bound(stack, prefilled, form, adapter, **sampling)
    assert whole.finished.finish_reason is FinishReason.STOP
    texts = [event.text for event in whole.events[1:-1] if hasattr(event, "text")]
    cuts = range(1, len(whole.tokens) + 1)
    resumed = await asyncio.gather(
        *(
            bound(
                stack,
                prefilled,
                form,
                adapter,
                resume=Resume(whole.tokens[:cut], whole.started.invocation_start, whole.started.adapter_digest),
                **sampling,
            )
            for cut in cuts
        )
    )
    for cut, rest in zip(cuts, resumed, strict=True):
        assert whole.tokens[:cut] + rest.tokens == whole.tokens
        assert "".join(texts[:cut]) + rest.text == whole.text
        assert rest.finished.finish_reason is FinishReason.STOP
        assert rest.finished.stop_string == whole.finished.stop_string


async def test_tokens_that_do_not_have_the_form_are_not_gone_on_with(stack: Stack, prefilled: PrefillResult) -> None:
    resume = Resume((1, 2, 3), None, "")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"resume\.generated_token_ids"):
        await bound(stack, prefilled, Regex("[ab]*"), resume=resume)
    [end] = stack.core.model.tokenizer.end_of_sequence_ids
    resume = Resume((end, end), None, "")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"resume\.generated_token_ids"):
        await bound(stack, prefilled, Regex("[ab]*"), resume=resume)


async def test_masks_are_computed_while_the_forward_pass_runs(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other to have begun: neither comes first, and no step takes the sum of both."""
    mask, forward = Constraint.mask, ModelRunner.forward
    expected = await bound(stack, prefilled, Regex("[ab]{4}"))
    both = threading.Barrier(2, timeout=PATIENCE_SECONDS)
    met = list[int]()

    def slow_mask(constraint: Constraint) -> bytes | None:
        both.wait()
        return mask(constraint)

    def slow_forward(runner: ModelRunner, spans: Any, output: Any, adapters: object = None) -> Any:
        if any(output):
            met.append(both.wait())
        return forward(runner, spans, output, adapters)

    monkeypatch.setattr(Constraint, "mask", slow_mask)
    monkeypatch.setattr(ModelRunner, "forward", slow_forward)
    answer = await bound(stack, prefilled, Regex("[ab]{4}"))
    assert len(met) == 4
    assert answer.tokens == expected.tokens


# --- forms that are compiled anew -------------------------------------------------------------------------------------

BRANCHES = Regex("[a-j]{40}|[k-t]{40}|[0-9]{40}")


async def test_answers_are_the_same_whatever_others_have_used_up_of_their_form(
    model: BaseModel, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn ones: which tokens are drawn tells that nothing was drawn twice, from other logits or in another place."""

    async def answers() -> list[Answer]:
        async with open_stack(model, MemoryStore(), adapters) as stack:
            prefilled = await stack.prefill(PROMPT)
            sampling = {"temperature": 1.0, "frequency_penalty": 2.0}
            of_seeds = [bound(stack, prefilled, BRANCHES, seed=seed, **sampling) for seed in range(8)]
            return await asyncio.gather(*of_seeds, bound(stack, prefilled, None, max_tokens=60))

    expected = await answers()
    assert len({answer.text[0] in "abcdefghij" for answer in expected[:-1]}) == 2, "of more than one branch"
    monkeypatch.setattr(compiling, "_LIMITS", compiling.LLParserLimits(max_lexer_states=70, verbose_errors=False))
    renewed = list[StructuredOutput]()
    compile_anew = CompiledForm.renewed
    monkeypatch.setattr(CompiledForm, "renewed", lambda form: renewed.append(form.form) or compile_anew(form))
    told = await answers()
    assert renewed
    assert [answer.tokens for answer in told] == [answer.tokens for answer in expected]
    assert [answer.text for answer in told] == [answer.text for answer in expected]
    assert [answer.logprobs for answer in told] == [pytest.approx(answer.logprobs, abs=1e-4) for answer in expected]


async def test_no_other_answer_waits_for_a_form_that_is_compiled_anew(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await bound(stack, prefilled, Regex("[ab]{9}"))
    slow, begun, others_are_done = Regex("[ab]{9} ?"), threading.Event(), threading.Event()
    mask, catch_up, held = Constraint.mask, Constraint._catch_up, list[bool]()

    def used_up_once(constraint: Constraint) -> bytes:
        if constraint._form.form == slow and len(constraint._tokens) == 3 and not held:
            raise FormUsedUpError("used up")
        return mask(constraint)

    def wait(constraint: Constraint) -> bool:
        begun.set()
        held.append(others_are_done.wait(PATIENCE_SECONDS))
        return catch_up(constraint)

    monkeypatch.setattr(Constraint, "mask", used_up_once)
    monkeypatch.setattr(Constraint, "_catch_up", wait)
    waiting = asyncio.create_task(bound(stack, prefilled, slow, max_tokens=9))
    assert await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
    others = await asyncio.gather(bound(stack, prefilled, Regex("[ab]{9}")), bound(stack, prefilled, None))
    assert not waiting.done()
    others_are_done.set()
    assert (await waiting).tokens == expected.tokens
    assert held == [True]
    assert others[0].tokens == expected.tokens


async def test_who_leaves_while_its_form_is_compiled_anew_is_let_go_of(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The books of the stack are checked as it closes; and the engine rests, as nothing waits any more."""
    compiling_anew, left = threading.Event(), threading.Event()

    def used_up(constraint: Constraint) -> bytes:
        raise FormUsedUpError("used up")

    def wait(constraint: Constraint) -> bool:
        compiling_anew.set()
        assert left.wait(PATIENCE_SECONDS)
        raise AloraServeError("nobody is told")

    monkeypatch.setattr(Constraint, "mask", used_up)
    monkeypatch.setattr(Constraint, "_catch_up", wait)
    leaving = asyncio.create_task(bound(stack, prefilled, Regex("[ab]{9}")))
    assert await asyncio.to_thread(compiling_anew.wait, PATIENCE_SECONDS)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    left.set()
    assert (await bound(stack, prefilled, None, max_tokens=3)).tokens
    assert stack.core.engine.load.running == 0


async def test_a_form_that_cannot_be_compiled_anew_ends_its_answer_alone(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used_up(constraint: Constraint) -> bytes:
        raise FormUsedUpError("used up")

    def fail(constraint: Constraint) -> bool:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Constraint, "mask", used_up)
    monkeypatch.setattr(Constraint, "_catch_up", fail)
    alone, other = await asyncio.gather(
        bound(stack, prefilled, Regex("[ab]{9}")), bound(stack, prefilled, None), return_exceptions=True
    )
    assert isinstance(alone, AloraServeError)
    assert "no memory" in str(alone)
    assert isinstance(other, Answer)


async def test_a_thread_that_cannot_be_started_ends_the_answer_that_needs_it_alone(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a container's limit of threads."""
    start = threading.Thread.start

    def used_up(constraint: Constraint) -> bytes:
        raise FormUsedUpError("used up")

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "renew":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(Constraint, "mask", used_up)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    alone, other = await asyncio.gather(
        bound(stack, prefilled, Regex("[ab]{9}")), bound(stack, prefilled, None), return_exceptions=True
    )
    assert isinstance(alone, AloraServeError)
    assert not isinstance(alone, StepFailedError)
    assert "can't start new thread" in str(alone)
    assert isinstance(other, Answer)


async def test_who_leaves_an_idle_engine_before_its_form_has_its_turn_has_nothing_compiled(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling_anew, left, compiled = threading.Event(), threading.Event(), list[Constraint]()

    def used_up(constraint: Constraint) -> bytes:
        raise FormUsedUpError("used up")

    def wait(constraint: Constraint) -> bool:
        compiled.append(constraint)
        compiling_anew.set()
        assert left.wait(PATIENCE_SECONDS)
        raise AloraServeError("nobody is told")

    monkeypatch.setattr(Constraint, "mask", used_up)
    monkeypatch.setattr(Constraint, "_catch_up", wait)
    engine = stack.core.engine
    renewals = engine._stepper.renewals
    leaving = [asyncio.create_task(bound(stack, prefilled, Regex("[ab]{9}"))) for _ in range(2)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (compiling_anew.is_set() and len(renewals._held) == 2):  # noqa: ASYNC110  # the engine's thread
            await asyncio.sleep(0.01)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        while engine.load.running:  # noqa: ASYNC110  # the engine's thread
            await asyncio.sleep(0.01)
    assert renewals._held == []
    left.set()
    for thread in threading.enumerate():
        if thread.name == "renew":
            await asyncio.to_thread(thread.join, PATIENCE_SECONDS)
    assert len(compiled) == 1


# --- refusals and failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "field", "part"),
    [
        (json_schema({"properties": {"a": {"not": {}}}}), "json_schema", "'not' at /properties/a"),
        (Regex("(?=a)b"), "regex", "look-around"),
        (Grammar("start: nothing"), "grammar", "nothing"),
    ],
)
async def test_a_form_that_cannot_be_held_to_is_refused_before_any_event(
    stack: Stack, prefilled: PrefillResult, form: StructuredOutput, field: str, part: str
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(part)) as caught:
        await bound(stack, prefilled, form)
    assert [violation.field for violation in caught.value.violations] == [f"sampling.structured_output.{field}"]


async def test_an_answer_that_cannot_go_on_fails_alone(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no check foresees: a form that becomes too complex in the middle."""
    monkeypatch.setattr(compiling, "_LIMITS", compiling.LLParserLimits(max_lexer_states=60, verbose_errors=False))
    broken, fine = await asyncio.gather(
        bound(stack, prefilled, Regex("[a-z]{100,500}")),
        bound(stack, prefilled, None, max_tokens=100),
        return_exceptions=True,
    )
    assert isinstance(broken, InvalidRequestError)
    assert [violation.field for violation in broken.violations] == ["sampling.structured_output.regex"]
    assert isinstance(fine, Answer)
    assert len(fine.tokens) == 100


class PanicException(BaseException):
    """As pyo3 raises it: no Exception."""


class FaultyMatcher:
    """A matcher one of whose calls breaks, the third time it is made."""

    def __init__(self, matcher: Any, call: str, error: BaseException) -> None:
        self._matcher, self._call, self._error, self._calls = matcher, call, error, 0

    def __getattr__(self, name: str) -> Any:
        if name == self._call:
            self._calls += 1
            if self._calls == 3:
                raise self._error
        return getattr(self._matcher, name)


@pytest.mark.parametrize("error", [RuntimeError("poisoned"), PanicException("index out of bounds")])
@pytest.mark.parametrize("call", ["consume_tokens", "compute_bitmask", "is_stopped"])
async def test_a_fault_in_following_a_form_ends_that_answer_alone(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    """Whether while its mask is computed, its token taken, or asked whether that was the last."""
    faulty, sound = Regex("[a-z]{9}"), Regex("[0-9]{30}")
    expected = [await bound(stack, prefilled, form, max_tokens=30) for form in (sound, None)]
    matcher = CompiledForm.matcher

    def broken(form: CompiledForm) -> Any:
        return FaultyMatcher(matcher(form), call, error) if form.form == faulty else matcher(form)

    monkeypatch.setattr(CompiledForm, "matcher", broken)
    alone, *others = await asyncio.gather(
        *(bound(stack, prefilled, form, max_tokens=30) for form in (faulty, sound, None)), return_exceptions=True
    )
    assert isinstance(alone, AloraServeError)
    assert f"the form of the answer cannot be followed: {error!r}" in str(alone)
    assert [answer.tokens for answer in others if isinstance(answer, Answer)] == [answer.tokens for answer in expected]
    assert not stack.core.engine.ended.done()


async def test_a_fault_in_the_last_of_the_text_ends_that_answer_alone(
    stack: Stack, prefilled: PrefillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text held back for a stop string is asked about once more at the end."""
    finish = TextStream.finish

    def broken(text: TextStream) -> str:
        if text._stop:
            raise AloraServeError("the form of the answer cannot be followed")
        return finish(text)

    monkeypatch.setattr(TextStream, "finish", broken)
    alone, other = await asyncio.gather(
        bound(stack, prefilled, Regex("[a-z]{3}"), stop=("!",)),
        bound(stack, prefilled, Regex("[a-z]{9}")),
        return_exceptions=True,
    )
    assert isinstance(alone, AloraServeError)
    assert isinstance(other, Answer)
    assert len(other.text) == 9


# --- log-probabilities ------------------------------------------------------------------------------------------------


async def test_logprobs_are_the_models_whatever_the_form_allows(stack: Stack, prefilled: PrefillResult) -> None:
    """The likeliest tokens stand there though the form forbids them, and the chosen one has its share of the whole."""
    answer = await bound(stack, prefilled, Choice(("yes", "no")), top_logprobs=20)
    free = await bound(stack, prefilled, None, max_tokens=1, top_logprobs=20)
    first, free_first = answer.chunks[0], free.chunks[0]
    assert first.top_logprobs == free_first.top_logprobs
    [top] = first.top_logprobs
    assert len(top) == 20
    assert [token.logprob for token in top] == sorted((token.logprob for token in top), reverse=True)
    assert top[0].token_id == free.tokens[0]
    assert sum(math.exp(token.logprob) for token in top) < 1
    assert first.token_bytes == (answer.text[:1].encode(),)
    assert [token.token_bytes for token in top] == [
        stack.core.model.tokenizer.spell([token.token_id]).encode() if token.token_id > 255 else token.token_bytes
        for token in top
    ]


async def test_without_top_logprobs_only_the_chosen_token_is_told(stack: Stack, prefilled: PrefillResult) -> None:
    told = await bound(stack, prefilled, None, logprobs=True, max_tokens=1)
    untold = await bound(stack, prefilled, None, logprobs=False, max_tokens=1)
    assert (len(told.chunks[0].logprobs), len(told.chunks[0].token_bytes), told.chunks[0].top_logprobs) == (1, 1, ())
    assert (untold.chunks[0].logprobs, untold.chunks[0].token_bytes) == ((), ())


async def test_forms_are_compiled_for_each_tenant(model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[bytes] = []
    async with open_stack(model, MemoryStore(), options=CoreOptions(tenant_salt=b"a secret of the tests")) as stack:
        compiler = stack.decoder._answers._compiler
        compile_once = compiler.compile

        def note(form: StructuredOutput, tenant_salt: bytes) -> CompiledForm:
            compiled.append(tenant_salt)
            return compile_once(form, tenant_salt)

        monkeypatch.setattr(compiler, "compile", note)
        sampling = SamplingParams(max_tokens=5, structured_output=Regex("ab"))
        for tenant in ("acme", "beta"):
            handle = (await stack.prefiller.prefill(PROMPT, tenant=tenant)).handle
            async for _ in stack.decoder.decode(GenerateRequest(handle, sampling=sampling, tenant=tenant)):
                pass
        assert compiled == [stack.core.tenants.of(tenant) for tenant in ("acme", "beta")]

"""The boundary rule against PEFT's own search, and the traps, each with the wrong value that falling into it gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from alora_serve.adapters.activation import Activation, find_last, no_activation, place_invocation
from alora_serve.errors import InvocationUnplaceableError
from alora_serve.types import PromptKind, TokenIds

A, B, C, D = 1, 2, 3, 4

# Few distinct tokens, so that matches, near misses and overlaps are the rule.
tokens = st.lists(st.integers(0, 2), max_size=12).map(tuple)
invocations = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)
kinds = st.sampled_from(PromptKind)


def start_by_peft(prompt: TokenIds, invocation: TokenIds) -> int | None:
    configs = {"x": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=list(invocation))}
    [offset] = calculate_alora_offsets(configs, "x", torch.tensor([prompt], dtype=torch.long))
    return None if offset is None else len(prompt) - offset


def place(
    kind: PromptKind, prefix: TokenIds, generation_prompt: TokenIds, invocation: TokenIds, vocabulary_size: int = 100
) -> Activation:
    return place_invocation(
        kind=kind,
        prefix_tokens=prefix,
        generation_prompt_tokens=generation_prompt,
        invocation_tokens=invocation,
        adapter_name="certainty",
        vocabulary_size=vocabulary_size,
    )


@given(tokens, invocations)
def test_find_last_is_pefts_search(prompt: TokenIds, invocation: TokenIds) -> None:
    assert find_last(prompt, invocation) == start_by_peft(prompt, invocation)


@pytest.mark.parametrize(
    ("prompt", "invocation", "start", "wrong"),
    [
        pytest.param((A, B, B), (A, B), 0, "None, when only an occurrence at the end counts", id="a-b-in-a-b-b"),
        pytest.param((A, A, B), (A, B), 1, "None, when a failed match skips the tokens it read", id="a-b-in-a-a-b"),
        pytest.param((A, B, A), (A, B), 0, "None, when only the last first-token is tried", id="a-b-in-a-b-a"),
        pytest.param((A, A, A), (A, A), 1, "0, when occurrences may not overlap", id="a-a-in-a-a-a"),
        pytest.param((A, B, C, A, B), (A, B), 3, "0, when the first match counts", id="last-not-first"),
        pytest.param((A, B, C, A), (A, B, C), 0, "None", id="partial-at-the-end"),
        pytest.param((A,), (A, B), None, "IndexError, when the end is not checked", id="longer-than-the-prompt"),
        pytest.param((), (A,), None, "", id="empty-prompt"),
        pytest.param((A, B), (), None, "2, as an empty pattern matches everywhere", id="empty-pattern"),
    ],
)
def test_find_last_traps(prompt: TokenIds, invocation: TokenIds, start: int | None, wrong: str) -> None:
    assert find_last(prompt, invocation) == start, f"a wrong scan gives {wrong}"


@given(kinds, tokens, tokens, invocations)
@example(PromptKind.CONVERSATION, (A, A), (), (A, A))  # the appended invocation overlaps the prefix's tokens
def test_every_placement_turns_on_exactly_where_peft_would_on_that_prompt(
    kind: PromptKind, prefix: TokenIds, generation_prompt: TokenIds, invocation: TokenIds
) -> None:
    if kind is PromptKind.TOKENS:
        generation_prompt = ()
    activation = place(kind, prefix, generation_prompt, invocation)
    assert activation.invocation_start is not None
    assert activation.invocation_start == start_by_peft(prefix + activation.suffix_tokens, invocation)


@given(tokens, tokens, invocations)
def test_the_generation_prompt_is_the_suffix_only_when_a_match_ends_past_the_prefix(
    prefix: TokenIds, generation_prompt: TokenIds, invocation: TokenIds
) -> None:
    whole = prefix + generation_prompt
    start = start_by_peft(whole, invocation)
    activation = place(PromptKind.CONVERSATION, prefix, generation_prompt, invocation)
    if start is not None and start + len(invocation) > len(prefix):
        assert activation == Activation(generation_prompt, start)
    else:
        assert activation == Activation(invocation, len(prefix))


@given(tokens, invocations)
def test_an_appended_invocation_is_the_last_occurrence_whatever_it_overlaps(
    prefix: TokenIds, invocation: TokenIds
) -> None:
    assert start_by_peft(prefix + invocation, invocation) == len(prefix)


def test_an_invocation_that_is_the_generation_prompt_is_not_appended_a_second_time() -> None:
    activation = place(PromptKind.CONVERSATION, (A, B), (C, D), (C, D))
    assert activation == Activation((C, D), 2), "appending would give suffix (C, D, C, D) and start 4"


def test_an_invocation_inside_the_generation_prompt_starts_there() -> None:
    activation = place(PromptKind.CONVERSATION, (A, B), (C, D, A), (D, A))
    assert activation == Activation((C, D, A), 3), "adapting the whole generation prompt would start at 2"


def test_an_invocation_that_spans_the_edge_starts_inside_the_prefix() -> None:
    # The caller clamps `cached` to 1: with cached = len(prefix) = 2, token 1 would keep base KV, which shifts logits by
    # hundredths and raises no error.
    activation = place(PromptKind.CONVERSATION, (A, B), (C, D), (B, C))
    assert activation == Activation((C, D), 1), "searching the generation prompt alone would append (B, C) at 2"


def test_a_one_token_invocation_does_not_match_the_prefixs_last_token() -> None:
    activation = place(PromptKind.CONVERSATION, (A, B), (C,), (B,))
    assert activation == Activation((B,), 2), (
        "a window one token too wide would give start 1 with no invocation after it"
    )


def test_an_invocation_of_an_earlier_turn_does_not_count() -> None:
    activation = place(PromptKind.CONVERSATION, (A, B, C), (D,), (A, B))
    assert activation == Activation((A, B), 3), "taking the old match would adapt from 0 and reuse nothing"


def test_a_conversation_without_generation_prompt_gets_the_invocation_appended() -> None:
    assert place(PromptKind.CONVERSATION, (A, B), (), (A, B)) == Activation((A, B), 2)


def test_raw_tokens_are_taken_exactly_as_given_when_the_invocation_is_among_them() -> None:
    activation = place(PromptKind.TOKENS, (A, B, C, A, B, D), (), (A, B))
    assert activation == Activation((), 3), "appending would answer another prompt than the one given"


def test_raw_tokens_without_the_invocation_get_it_appended() -> None:
    activation = place(PromptKind.TOKENS, (A, C), (), (A, B))
    assert activation == Activation((A, B), 2), "not appending would be a silent base answer"


def test_the_invocation_alone_is_a_prompt() -> None:
    assert place(PromptKind.TOKENS, (), (), (A, B)) == Activation((A, B), 0)
    assert place(PromptKind.CONVERSATION, (), (), (A, B)) == Activation((A, B), 0)


@pytest.mark.parametrize(
    ("invocation", "named"), [((), r"\[\]"), ((A, 100), r"\[1, 100\].*\[100\].*vocabulary of 100"), ((-1,), r"\[-1\]")]
)
@pytest.mark.parametrize("kind", PromptKind)
def test_an_invocation_that_cannot_be_is_refused_naming_adapter_and_tokens(
    kind: PromptKind, invocation: TokenIds, named: str
) -> None:
    with pytest.raises(InvocationUnplaceableError, match=f"'certainty'.*{named}"):
        place(kind, (A, B), (), invocation)


def test_base_and_plain_lora_run_the_prompt_as_rendered() -> None:
    assert no_activation((C, D)) == Activation((C, D), None)


# --- IBM's old format -------------------------------------------------------------------------------------------------


def start_by_ibm(prompt: TokenIds, invocation: TokenIds) -> int | None:
    """As ``alora`` 0.3.0 generates: on for the last ``len(prompt) - 1 - start`` tokens, of the last occurrence."""
    starts = [at for at in range(len(prompt)) if prompt[at : at + len(invocation)] == invocation]
    return len(prompt) - (len(prompt) - 1 - max(starts)) if starts else None


@given(kinds, tokens, tokens, st.integers(0, 2), invocations)
@example(PromptKind.TOKENS, (A, B, C, B), (), A, (B,))  # the last B alone is no occurrence
def test_with_a_lead_every_placement_turns_on_where_ibms_package_would_on_that_prompt(
    kind: PromptKind, prefix: TokenIds, generation_prompt: TokenIds, lead: int, invocation: TokenIds
) -> None:
    generation_prompt = () if kind is PromptKind.TOKENS else generation_prompt
    placed = place_invocation(
        kind=kind,
        prefix_tokens=prefix,
        generation_prompt_tokens=generation_prompt,
        invocation_tokens=invocation,
        lead_tokens=(lead,),
        adapter_name="certainty",
        vocabulary_size=100,
    )
    assert placed.invocation_start == start_by_ibm(prefix + placed.suffix_tokens, (lead, *invocation))
    assert placed.suffix_tokens in ((), generation_prompt, (lead, *invocation))

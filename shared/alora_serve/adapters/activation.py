"""The boundary rule, in one place: which tokens follow a prefix, and from which position on an adapter is on.

A prompt is ``prefix_tokens + suffix_tokens``. PEFT turns an aLoRA on at the first token of the **last** occurrence of
its invocation, inclusive, through the prompt's end and every generated token. Positions are owned like this::

    [0, cached)                      base KV from the store or the process; the caller keeps cached <= invocation_start
    [cached, invocation_start)       base KV computed here, adapter off, written back
    [invocation_start, prompt_len)   adapter KV, private to the request, never stored
    [prompt_len, ...)                generated tokens, adapter KV, private to the request, never stored

Call :func:`place_invocation` once a request, on the original prompt. Generated text is never searched: an answer that
repeats the invocation would move ``invocation_start`` past KV that was computed with the adapter on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alora_serve.errors import InvocationUnplaceableError
from alora_serve.types import PromptKind, TokenIds


@dataclass(frozen=True, slots=True)
class Activation:
    """What a worker runs after the prefix, and where the adapter turns on.

    Attributes:
        suffix_tokens: follow ``prefix_tokens``; together they are the prompt. May be empty.
        invocation_start: first adapted position of the prompt. It may lie *inside* the prefix, where ``cached`` must be
            clamped to it. None for base and plain LoRA, whose adapter (if any) is on from position 0.
    """

    suffix_tokens: TokenIds
    invocation_start: int | None


def find_last(tokens: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Start of the last occurrence of ``pattern`` in ``tokens``, or None; occurrences may overlap.

    Equal to PEFT's ``calculate_alora_offsets`` (``len(tokens) - offset``). It compares every start, from the end: a
    scan that skips past a partial match misses ``[a, b]`` in ``a a b``, one that tries only the last ``a`` misses it in
    ``a b a``, and one that anchors at the end misses it in ``a b b``. An empty pattern occurs nowhere.
    """
    length = len(pattern)
    if length == 0:
        return None
    first, wanted = pattern[0], tuple(pattern)
    for start in range(len(tokens) - length, -1, -1):
        if tokens[start] == first and tuple(tokens[start : start + length]) == wanted:
            return start
    return None


def place_invocation(
    *,
    kind: PromptKind,
    prefix_tokens: TokenIds,
    generation_prompt_tokens: TokenIds,
    invocation_tokens: TokenIds,
    lead_tokens: TokenIds = (),
    adapter_name: str,
    vocabulary_size: int,
) -> Activation:
    """Where ``adapter_name``, an aLoRA, turns on after this prefix, and the suffix that makes it so.

    * A conversation: when the last match in prefix and generation prompt ends past the prefix, the template already
      invokes the adapter (the invocation is the generation prompt, lies in it, or spans the edge) and the suffix is the
      generation prompt. Otherwise the suffix is the invocation. A match wholly inside the prefix does not count: it
      belongs to an earlier turn, and taking it would adapt the conversation since.
    * Raw tokens are the exact prompt: a match anywhere is taken as PEFT would, and only without one is the invocation
      appended. ``generation_prompt_tokens`` is empty then (see :class:`~alora_serve.types.PrefixHandle`).

    ``lead_tokens`` belong before the invocation, with base weights: IBM's old format turns an adapter on one token
    after its invocation string begins. A match is of both, and both are appended.

    Raises:
        InvocationUnplaceableError: the invocation is empty, or has ids outside ``[0, vocabulary_size)``. Answering
            without it would be a silent base answer.
    """
    _check_placeable(invocation_tokens, adapter_name, vocabulary_size)
    sequence, lead = lead_tokens + invocation_tokens, len(lead_tokens)
    if kind is PromptKind.TOKENS:
        start = find_last(prefix_tokens, sequence)
        if start is not None:
            return Activation(suffix_tokens=(), invocation_start=start + lead)
    else:
        # Ending past the prefix is starting at `edge` or later; the prefix before it, however long, is not searched.
        edge = max(0, len(prefix_tokens) - len(sequence) + 1)
        start = find_last(prefix_tokens[edge:] + generation_prompt_tokens, sequence)
        if start is not None:
            return Activation(suffix_tokens=generation_prompt_tokens, invocation_start=edge + start + lead)
    # The end of the prefix is the last start at which the sequence fits, so this occurrence is the last.
    return Activation(suffix_tokens=sequence, invocation_start=len(prefix_tokens) + lead)


def no_activation(generation_prompt_tokens: TokenIds) -> Activation:
    """The base model, or a plain LoRA: the prompt as rendered, nothing searched, nothing appended."""
    return Activation(suffix_tokens=generation_prompt_tokens, invocation_start=None)


def _check_placeable(invocation_tokens: TokenIds, adapter_name: str, vocabulary_size: int) -> None:
    if not invocation_tokens:
        raise InvocationUnplaceableError(f"adapter {adapter_name!r} is invoked by no tokens ([]), so it never turns on")
    foreign = [token for token in invocation_tokens if not 0 <= token < vocabulary_size]
    if foreign:
        raise InvocationUnplaceableError(
            f"adapter {adapter_name!r} is invoked by tokens {list(invocation_tokens)}, of which {foreign} are outside "
            f"the base model's vocabulary of {vocabulary_size}"
        )

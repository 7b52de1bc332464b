"""Which sequences run how many tokens in a step. Pure."""

from __future__ import annotations

from collections.abc import Sequence as Listed

from alora_serve.engine.sequence import Sequence


def share_step(pending: Listed[int], budget_tokens: int, mixed_budget_tokens: int | None = None) -> list[int]:
    """Tokens each sequence runs in the next step, given how many it still has to run.

    A sequence with one token (decoding) always runs it: what people watch never waits for someone's long prompt. The
    rest of the budget goes to the others in equal shares, shortest first: what a short one leaves flows to longer ones,
    and a long prompt cannot block a short one. At least one token a step goes to the prompts, so none starves.

    Args:
        pending: tokens each sequence could run now, each >= 1.
        budget_tokens: tokens of one step, >= 1; decoding sequences may exceed it together.
        mixed_budget_tokens: prompt tokens beside decoding sequences, whose next token waits for the whole step.

    Returns:
        For each sequence, between 0 and its pending tokens.
    """
    shares = [1 if count == 1 else 0 for count in pending]
    prompts = sorted((index for index, count in enumerate(pending) if count > 1), key=lambda index: pending[index])
    budget = budget_tokens - sum(shares)
    if mixed_budget_tokens is not None and any(shares):
        budget = min(budget, mixed_budget_tokens)
    left = max(budget, 1) if prompts else 0
    for position, index in enumerate(prompts):
        shares[index] = min(pending[index], max(left // (len(prompts) - position), 1 if left else 0))
        left -= shares[index]
    return shares


def followers(sequences: Listed[Sequence]) -> set[Sequence]:
    """Those whose next block of base KV an earlier one of ``sequences`` is about to compute: they wait and adopt it.

    So concurrent identical prefills, and a fan-out whose prefix the store lost, compute every block once. A sequence
    that has begun to compute for itself goes on.
    """
    leaders: list[Sequence] = []
    waiting = set[Sequence]()
    for sequence in sequences:
        if sequence.is_fresh and any(_computes_next_block_of(leader, sequence) for leader in leaders):
            waiting.add(sequence)
        elif sequence.in_base_phase:
            leaders.append(sequence)
    return waiting


def _computes_next_block_of(leader: Sequence, follower: Sequence) -> bool:
    chain, theirs = follower.request.chain, leader.request.chain
    if follower.last_base_position <= follower.computed:
        return False
    end = (follower.computed // chain.block_tokens + 1) * chain.block_tokens
    if end > leader.prompt_base_end:
        # A tail is named by its exact tokens, where its leader's base phase ends.
        if not leader.names_tail:
            return False
        end = leader.prompt_base_end
    if not max(follower.computed, leader.computed) < end <= min(len(chain), len(theirs)):
        return False
    return chain.name_of(end) == theirs.name_of(end)

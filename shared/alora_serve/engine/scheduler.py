"""Which sequences run how many tokens in a step. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Listed

from alora_serve.engine.sequence import Sequence


def share_step(
    pending: Listed[int],
    budget_tokens: int,
    mixed_budget_tokens: int | None = None,
    tenants: Listed[str] | None = None,
) -> list[int]:
    """Tokens each sequence runs in the next step, given how many it still has to run.

    A sequence with one token (decoding) always runs it: what people watch never waits for someone's long prompt. The
    rest of the budget goes to the others in equal shares, shortest first: what a short one leaves flows to longer ones,
    and a long prompt cannot block a short one. Tenants are given equal shares first, and theirs are shared out among
    their sequences, so that many prompts of one tenant weigh as much as one of another. At least one token a step goes
    to the prompts, and where there is not one for each, those that came first have them, so none starves.

    Args:
        pending: tokens each sequence could run now, each >= 1, in the order of their coming.
        budget_tokens: tokens of one step, >= 1; decoding sequences may exceed it together.
        mixed_budget_tokens: prompt tokens beside decoding sequences, whose next token waits for the whole step.
        tenants: whose each sequence is; None: all of them one's.

    Returns:
        For each sequence, between 0 and its pending tokens.
    """
    shares = [1 if count == 1 else 0 for count in pending]
    prompts = [index for index, count in enumerate(pending) if count > 1]
    budget = budget_tokens - sum(shares)
    if mixed_budget_tokens is not None and any(shares):
        budget = min(budget, mixed_budget_tokens)
    held: defaultdict[str, list[int]] = defaultdict(list)
    for index in prompts:
        held[tenants[index] if tenants else ""].append(index)
    groups = list(held.values())
    wanted = [sum(pending[index] for index in group) for group in groups]
    for group, tokens in zip(groups, fill(wanted, max(budget, 1)), strict=True):
        for index, share in zip(group, fill([pending[index] for index in group], tokens), strict=True):
            shares[index] = share
    return shares


def fill(wanted: Listed[int], amount: int) -> list[int]:
    """Share out an amount equally; what one does not want flows to those who want more. Whole units, none left over.

    Where there is not one unit for each who wants any, the first in the list have one.
    """
    shares = [0] * len(wanted)
    order = sorted((index for index, most in enumerate(wanted) if most), key=wanted.__getitem__)
    if amount < len(order):
        order = sorted(order)[:amount]
    for position, index in enumerate(order):
        shares[index] = min(wanted[index], amount // (len(order) - position))
        amount -= shares[index]
    return shares


def next_to_run(
    waiting: Listed[Sequence], running: Iterable[Sequence], places: int, tenant_places: int
) -> list[Sequence]:
    """Who is given the free places of the batch, in order.

    Streams that were taken over from a lost worker come first: they had their place, and somebody has read half of
    them. Then whoever's tenant has the fewest in the batch, and of those the first to come.

    Args:
        waiting: in the order of their coming.
        running: the batch.
        places: free in it.
        tenant_places: that one tenant may have of it; those of no tenant may have all.
    """
    held = Counter(sequence.request.tenant for sequence in running)
    left = list(waiting)
    chosen: list[Sequence] = []
    while len(chosen) < places:
        fit = [one for one in left if not one.request.tenant or held[one.request.tenant] < tenant_places]
        if not fit:
            break
        best = min(fit, key=lambda one: (not one.request.is_taken_over, held[one.request.tenant]))
        left.remove(best)
        held[best.request.tenant] += 1
        chosen.append(best)
    return chosen


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

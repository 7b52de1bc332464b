"""How a step's token budget is shared among sequences. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def share_step(pending: Sequence[int], budget_tokens: int) -> list[int]:
    """Tokens each sequence runs in the next step, given how many it still has to run.

    A sequence with one token (decoding) always runs it: what people watch never waits for someone's long prompt. The
    rest of the budget goes to the others in equal shares, shortest first: what a short one leaves flows to longer ones,
    and a long prompt cannot block a short one. At least one token a step goes to the prompts, so none starves.

    Args:
        pending: tokens each sequence could run now, each >= 1.
        budget_tokens: tokens of one step, >= 1; decoding sequences may exceed it together.

    Returns:
        For each sequence, between 0 and its pending tokens.
    """
    shares = [1 if count == 1 else 0 for count in pending]
    prompts = sorted((index for index, count in enumerate(pending) if count > 1), key=lambda index: pending[index])
    left = max(budget_tokens - sum(shares), 1) if prompts else 0
    for position, index in enumerate(prompts):
        shares[index] = min(pending[index], max(left // (len(prompts) - position), 1 if left else 0))
        left -= shares[index]
    return shares

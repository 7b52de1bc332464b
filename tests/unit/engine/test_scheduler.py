"""Who runs how much in a step: decoding always, prompts in fair shares, nobody never."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from alora_serve.engine.scheduler import share_step

pendings = st.lists(st.one_of(st.just(1), st.integers(1, 500)), max_size=40)
budgets = st.integers(1, 300)


@given(pendings, budgets)
def test_nobody_runs_more_than_it_has(pending: list[int], budget: int) -> None:
    shares = share_step(pending, budget)
    assert len(shares) == len(pending)
    assert all(0 <= share <= count for share, count in zip(shares, pending, strict=True))


@given(pendings, budgets)
def test_decoding_sequences_always_run(pending: list[int], budget: int) -> None:
    shares = share_step(pending, budget)
    assert all(share == 1 for share, count in zip(shares, pending, strict=True) if count == 1)


@given(pendings, budgets)
def test_the_budget_holds_but_for_decoding_and_one_prompt_token(pending: list[int], budget: int) -> None:
    decoding = pending.count(1)
    prompts = len(pending) - decoding
    total = sum(share_step(pending, budget))
    assert total <= max(budget, decoding + (1 if prompts else 0))
    # And none of it is left over while a prompt has tokens to run.
    assert total == min(sum(pending), max(budget, decoding + (1 if prompts else 0)))


@given(pendings, budgets)
def test_every_prompt_gets_something_when_there_is_enough_for_all(pending: list[int], budget: int) -> None:
    shares = share_step(pending, budget)
    if budget >= len(pending):
        assert all(shares)
    assert any(shares) or not pending


@given(pendings, budgets)
def test_a_longer_prompt_gets_at_most_one_token_more_than_a_shorter_one_that_needs_more(
    pending: list[int], budget: int
) -> None:
    shares = share_step(pending, budget)
    pairs = list(zip(pending, shares, strict=True))
    for count, share in pairs:
        for other, other_share in pairs:
            if count < other and count > 1:
                assert share >= min(count, other_share - 1)  # the remainder of an uneven division


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), budgets)
def test_all_prompts_end_after_about_as_many_steps_as_their_tokens_take(pending: list[int], budget: int) -> None:
    left, steps = list(pending), 0
    while left:
        shares = share_step(left, budget)
        left = [count - share for count, share in zip(left, shares, strict=True) if count > share]
        steps += 1
        assert steps <= sum(pending) // budget + len(pending) + 1


def test_a_short_prompt_is_done_at_once_beside_a_long_one() -> None:
    assert share_step([5000, 20], 256) == [236, 20]


def test_equal_prompts_share_equally() -> None:
    assert share_step([900, 900, 900], 256) == [85, 85, 86]
    assert share_step([1, 900, 1, 900], 256) == [1, 127, 1, 127]


def test_a_prompt_moves_even_when_decoding_takes_the_whole_budget() -> None:
    assert share_step([1, 1, 1, 50], 2) == [1, 1, 1, 1]


def test_nothing_pending_is_nothing_to_do() -> None:
    assert share_step([], 256) == []


def test_the_shortest_go_first_when_there_is_not_enough_for_all() -> None:
    assert share_step([70, 50, 60], 2) == [0, 1, 1]

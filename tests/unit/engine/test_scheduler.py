"""Who runs how much in a step: decoding always, prompts in fair shares, nobody never."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from alora_serve.engine.scheduler import fill, next_to_run, share_step

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


@given(st.lists(st.tuples(st.sampled_from(["acme", "beta"]), st.integers(2, 500)), min_size=1, max_size=40), budgets)
def test_who_came_first_moves_whatever_comes_later(prompts: list[tuple[str, int]], budget: int) -> None:
    names, pending = [name for name, _ in prompts], [count for _, count in prompts]
    shares = share_step(pending, budget, None, names)
    assert shares[0] >= 1
    for name in set(names):
        its = [share for share, whose in zip(shares, names, strict=True) if whose == name]
        assert 0 not in its[: sum(its)], "within a tenant likewise"


def test_a_long_prompt_ends_though_more_short_ones_come_than_there_are_tokens_for() -> None:
    long, short, steps = 40, list[int](), 0
    while long:
        short += [2] * 3
        shares = share_step([long, *short], 4)
        long -= shares[0]
        short = [count - share for count, share in zip(short, shares[1:], strict=True) if count > share]
        steps += 1
        assert steps <= 40


def test_those_who_came_first_go_on_when_there_is_not_enough_for_all() -> None:
    assert share_step([70, 50, 60], 2) == [1, 1, 0]


# --- tenants ----------------------------------------------------------------------------------------------------------

tenants = st.sampled_from(["acme", "beta", "gamma"])


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 300))
def test_an_amount_is_shared_out_whole_and_equally(wanted: list[int], amount: int) -> None:
    shares = fill(wanted, amount)
    assert sum(shares) == min(amount, sum(wanted))
    assert all(0 <= share <= most for share, most in zip(shares, wanted, strict=True))
    unfilled = [share for share, most in zip(shares, wanted, strict=True) if share < most]
    if unfilled:
        assert max(shares) - min(unfilled) <= 1


@given(st.lists(st.tuples(tenants, st.integers(2, 500)), min_size=1, max_size=30), budgets)
def test_many_prompts_of_one_tenant_weigh_as_much_as_one_of_another(
    prompts: list[tuple[str, int]], budget: int
) -> None:
    names, pending = [name for name, _ in prompts], [count for _, count in prompts]
    shares = share_step(pending, budget, None, names)
    assert sum(shares) == min(budget, sum(pending))
    given_to, wanted = Counter[str](), Counter[str]()
    for name, share, count in zip(names, shares, pending, strict=True):
        given_to[name] += share
        wanted[name] += count
    for name in wanted:
        if given_to[name] < wanted[name]:
            assert max(given_to.values()) - given_to[name] <= 1


@given(pendings, budgets)
def test_without_tenants_it_is_as_if_all_were_one_s(pending: list[int], budget: int) -> None:
    assert share_step(pending, budget) == share_step(pending, budget, None, ["acme"] * len(pending))


def one(tenant: str, number: int = 0, *, taken_over: bool = False) -> Any:
    return SimpleNamespace(number=number, request=SimpleNamespace(tenant=tenant, is_taken_over=taken_over))


@given(st.lists(tenants, max_size=40), st.lists(tenants, max_size=20), st.integers(0, 20), st.integers(1, 10))
def test_places_go_to_whoever_has_fewest_and_nobody_has_more_than_its_share(
    waiting: list[str], running: list[str], places: int, most: int
) -> None:
    batch = [one(tenant) for tenant in running]
    chosen = next_to_run([one(tenant, number) for number, tenant in enumerate(waiting)], batch, places, most)
    held = Counter(running)
    for number, sequence in enumerate(chosen):
        tenant = sequence.request.tenant
        still_waiting = [name for at, name in enumerate(waiting) if all(one.number != at for one in chosen[:number])]
        assert held[tenant] == min(held[name] for name in still_waiting if held[name] < most)
        held[tenant] += 1
    assert all(count <= max(most, Counter(running)[tenant]) for tenant, count in held.items())
    left = Counter(waiting) - Counter(sequence.request.tenant for sequence in chosen)
    assert len(chosen) == places or all(held[tenant] >= most for tenant in left), "no place stays free for nothing"


@given(st.lists(st.booleans(), max_size=20), st.integers(0, 20))
def test_streams_taken_over_from_a_lost_worker_come_first_and_then_in_order(lost: list[bool], places: int) -> None:
    waiting = [one("", number, taken_over=was_lost) for number, was_lost in enumerate(lost)]
    chosen = next_to_run(waiting, [], places, 1)
    expected = sorted(waiting, key=lambda sequence: (not sequence.request.is_taken_over, sequence.number))[:places]
    assert [sequence.number for sequence in chosen] == [sequence.number for sequence in expected]

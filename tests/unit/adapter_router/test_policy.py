"""Who is picked, who never is, and what moves when endpoints come and go, get busy or hold what a request needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_router.affinity import rendezvous_order
from adapter_router.policy import (
    TIE_RATIO,
    TIE_SECONDS,
    Demand,
    EndpointSnapshot,
    Pick,
    eligible,
    load_bound,
    pick,
)
from adapter_router.prediction import UNKNOWN_PACE, Pace, predict, typical_pace
from alora_serve.kv.fingerprints import STRIDE_TOKENS
from alora_serve.types import AdapterDigest, AdapterInfo

MODEL = b"m" * 32
addresses = st.lists(st.integers(1, 65535).map(lambda port: f"10.0.0.1:{port}"), min_size=1, max_size=12, unique=True)
keys = st.binary(max_size=40) | st.sampled_from([b"a", b"b"])
factors = st.floats(1.0, 3.0)


def info(name: str, problem: str = "") -> AdapterInfo:
    return AdapterInfo(name, AdapterDigest("0" * 64), "alora", 8, ("q_proj",), (1,), "x", 10, False, problem)


def endpoint(address: str, in_flight: int = 0, **changes: object) -> EndpointSnapshot:
    base = EndpointSnapshot(address, in_flight=in_flight, model_digest=MODEL, adapters={"a": info("a")})
    return replace(base, **changes)  # type: ignore[arg-type]


def picked(endpoints: list[EndpointSnapshot], wanted: Demand, **how: Any) -> str | None:
    choice = pick(endpoints, wanted, **how)
    return choice and choice.address


def demand(key: bytes = b"k", adapter: str = "", group_size: int = 1) -> Demand:
    return Demand(key, {MODEL}, adapter, group_size)


paces = st.builds(Pace, *[st.sampled_from([0.0]) | st.floats(1e-5, 1.0)] * 5)
PREFIX = tuple(range(1000, 1006))
"""Fingerprints of a prefix of six strides."""


@st.composite
def fleets(draw: st.DrawFn) -> list[EndpointSnapshot]:
    """Endpoints in any state: some unfit, some that report nothing, some that hold what a request needs."""
    return [
        EndpointSnapshot(
            address,
            healthy=draw(st.sampled_from([True, True, True, False])),
            draining=draw(st.sampled_from([False, False, False, True])),
            in_flight=(in_flight := draw(st.integers(0, 20))),
            model_digest=draw(st.sampled_from([MODEL, MODEL, b"o" * 32])),
            adapters=draw(st.sampled_from([{"a": info("a")}, {"a": replace(info("a"), resident=True)}, {}])),
            reported_load=draw(st.integers(0, 40)),
            in_flight_at_report=draw(st.integers(0, in_flight)),
            places=draw(st.integers(0, 16)),
            pending_tokens=draw(st.integers(0, 500)),
            expected_tokens=draw(st.dictionaries(keys, st.integers(0, 500), max_size=3)),
            pace=draw(paces),
            prefixes=frozenset(PREFIX[: draw(st.integers(0, 6))]),
            coming_prefixes=frozenset(PREFIX[: draw(st.integers(0, 6))]),
            coming_adapters=draw(st.sampled_from([frozenset(), frozenset({"a"})])),
        )
        for address in draw(addresses)
    ]


demands = st.builds(
    Demand,
    keys,
    st.just({MODEL}),
    st.sampled_from(["", "a"]),
    fingerprints=st.just(PREFIX),
    prefix_tokens=st.integers(6 * STRIDE_TOKENS, 7 * STRIDE_TOKENS),
    computed_tokens=st.integers(0, 100),
)


def predicted(endpoints: list[EndpointSnapshot], wanted: Demand) -> dict[str, float]:
    """Seconds to the first token at each fit endpoint, by address."""
    fit = eligible(endpoints, wanted)
    typical = typical_pace([e.pace for e in fit]) if fit else UNKNOWN_PACE
    return {
        e.address: sum(
            predict(
                e.pace.filled(typical),
                load=e.load,
                places=e.places,
                pending_tokens=e.pending_tokens + sum(n for key, n in e.expected_tokens.items() if key != wanted.key),
                adapter_missing=e.lacks_adapter(wanted.adapter),
                missing_tokens=wanted.prefix_tokens - e.resident_tokens(wanted.fingerprints[::-1]),
                computed_tokens=wanted.computed_tokens,
            )
        )
        for e in fit
    }


def room(endpoints: list[EndpointSnapshot], wanted: Demand, factor: float) -> dict[str, int]:
    """How many more each fit endpoint may take, by address."""
    fit = eligible(endpoints, wanted)
    bound = load_bound(sum(e.in_flight for e in fit), max(1, len(fit)), factor, wanted.group_size)
    return {e.address: bound - e.in_flight for e in fit}


@given(keys, st.lists(st.integers(0, 50), min_size=1, max_size=12), factors)
def test_a_pick_never_fills_an_endpoint_beyond_the_bound(key: bytes, loads: list[int], factor: float) -> None:
    endpoints = [endpoint(f"10.0.0.1:{port}", load) for port, load in enumerate(loads, 1)]
    chosen = picked(endpoints, demand(key), load_factor=factor)
    assert chosen is not None
    held = next(e.in_flight for e in endpoints if e.address == chosen)
    assert held + 1 <= load_bound(sum(loads), len(loads), factor)


@given(keys, addresses, st.integers(1, 60), factors)
def test_a_burst_counted_as_it_is_picked_stays_within_the_bound(
    key: bytes, names: list[str], burst: int, factor: float
) -> None:
    loads = dict.fromkeys(names, 0)
    for _ in range(burst):
        chosen = picked([endpoint(name, load) for name, load in loads.items()], demand(key), load_factor=factor)
        assert chosen is not None
        loads[chosen] += 1
    assert max(loads.values()) <= load_bound(burst - 1, len(names), factor)


@given(keys, addresses)
def test_an_idle_pool_gives_the_preferred_endpoint(key: bytes, names: list[str]) -> None:
    assert picked([endpoint(name) for name in names], demand(key), load_factor=1.0) == rendezvous_order(key, names)[0]


@given(keys, addresses)
def test_every_healthy_endpoint_is_reachable_once_the_others_failed(key: bytes, names: list[str]) -> None:
    endpoints, tried = [endpoint(name) for name in names], list[str]()
    while (chosen := picked(endpoints, demand(key), load_factor=1.25, avoid=tried)) is not None:
        tried.append(chosen)
    assert tried == rendezvous_order(key, names)


@pytest.mark.parametrize(
    "unfit",
    [
        {"healthy": False},
        {"draining": True},
        {"model_digest": b"o" * 32},
        {"model_digest": b""},
        {"adapters": {}},
        {"adapters": {"a": info("a", problem="use_dora is set")}},
    ],
)
def test_an_unfit_endpoint_is_never_picked(unfit: dict[str, object]) -> None:
    bad = endpoint("10.0.0.1:1", **unfit)
    assert picked([bad], demand(adapter="a"), load_factor=1.25) is None
    assert picked([bad, endpoint("10.0.0.1:2", 99)], demand(adapter="a"), load_factor=1.25) == "10.0.0.1:2"


def test_no_endpoint_no_pick() -> None:
    assert picked([], demand(), load_factor=1.25) is None


def test_base_requests_need_no_adapter() -> None:
    assert eligible([endpoint("10.0.0.1:1", adapters={})], demand())


def test_an_unfit_endpoint_does_not_loosen_the_bound_of_the_others() -> None:
    idle_but_draining = [endpoint(f"10.0.1.1:{port}", draining=True) for port in range(1, 9)]
    busy, free = endpoint("10.0.0.1:1", 4), endpoint("10.0.0.1:2", 0)
    for key in (b"a", b"b", b"c", b"d"):
        assert picked([busy, free, *idle_but_draining], demand(key), load_factor=1.25) == "10.0.0.1:2"


# --- by prediction ----------------------------------------------------------------------------------------------------


@given(fleets(), demands, factors)
def test_only_a_fit_endpoint_with_room_is_picked_and_the_best_but_for_a_tie(
    endpoints: list[EndpointSnapshot], wanted: Demand, factor: float
) -> None:
    choice = pick(endpoints, wanted, load_factor=factor)
    seconds, rooms = predicted(endpoints, wanted), room(endpoints, wanted, factor)
    if choice is None:
        assert not seconds
        return
    assert rooms[choice.address] > 0
    best = min(seconds[address] for address, left in rooms.items() if left > 0)
    assert choice.predicted_seconds == seconds[choice.address]
    # Which also says that an endpoint which another beats beyond the tie, in whatever way, is never taken before it.
    assert seconds[choice.address] <= max(best * (1 + TIE_RATIO), best + TIE_SECONDS)


@given(fleets(), demands, factors, st.randoms(use_true_random=False))
def test_equal_input_gives_equal_picks_in_whatever_order_endpoints_are_known(
    endpoints: list[EndpointSnapshot], wanted: Demand, factor: float, random: Any
) -> None:
    shuffled = list(endpoints)
    random.shuffle(shuffled)
    first, again = (pick(listed, wanted, load_factor=factor) for listed in (endpoints, shuffled))
    assert (first and first.address) == (again and again.address)


@given(keys, addresses, st.integers(0, 20), factors)
def test_without_figures_affinity_decides_whatever_is_resident(
    key: bytes, names: list[str], load: int, factor: float
) -> None:
    first, *others = rendezvous_order(key, names)
    holder = replace(info("a"), resident=True)
    endpoints = [endpoint(first, load), *(endpoint(name, load, adapters={"a": holder}) for name in others)]
    wanted = Demand(key, {MODEL}, "a", fingerprints=PREFIX, prefix_tokens=2000)
    assert picked(endpoints, wanted, load_factor=factor) == first


@given(keys, addresses, paces)
def test_an_idle_endpoint_that_joins_takes_a_key_or_leaves_it_where_it_was(
    key: bytes, names: list[str], pace: Pace
) -> None:
    before = picked([endpoint(name, pace=pace) for name in names], demand(key), load_factor=1.25)
    for joining in (endpoint("10.9.9.9:1", pace=pace), endpoint("10.9.9.9:1")):
        after = picked([*(endpoint(name, pace=pace) for name in names), joining], demand(key), load_factor=1.25)
        assert after in {before, "10.9.9.9:1"}


PACE = Pace(0.04, 0.8, 0.05, 0.001, 1e-5)


@given(keys, st.integers(0, 5))
def test_of_two_alike_the_one_that_holds_the_adapter_is_taken(key: bytes, load: int) -> None:
    without, with_it = (endpoint(f"10.0.0.1:{port}", load, pace=PACE) for port in (1, 2))
    wanted = demand(key, "a")
    for holder in (
        replace(with_it, adapters={"a": replace(info("a"), resident=True)}),
        replace(with_it, coming_adapters={"a"}),
    ):
        choice = pick([without, holder], wanted, load_factor=1.25)
        assert choice == Pick("10.0.0.1:2", "adapter", choice.predicted_seconds if choice else 0)


@given(keys, st.integers(0, 5))
def test_of_two_alike_the_one_that_holds_the_prefix_is_taken(key: bytes, load: int) -> None:
    without, with_it = (endpoint(f"10.0.0.1:{port}", load, pace=PACE) for port in (1, 2))
    wanted = Demand(key, {MODEL}, fingerprints=PREFIX, prefix_tokens=1600)
    for holder in (replace(with_it, prefixes={*PREFIX}), replace(with_it, coming_prefixes={*PREFIX})):
        choice = pick([without, holder], wanted, load_factor=1.25)
        assert choice == Pick("10.0.0.1:2", "prefix", choice.predicted_seconds if choice else 0)


@given(keys, st.integers(1, 40))
def test_what_others_sent_there_is_waited_for_but_is_not_this_routers_share(key: bytes, others: int) -> None:
    busy, idle = (endpoint(f"10.0.0.1:{port}") for port in (1, 2))
    busy = replace(busy, reported_load=others)
    silent = picked([busy, idle], demand(key), load_factor=1.0)
    assert silent == rendezvous_order(key, [busy.address, idle.address])[0]
    choice = pick([replace(busy, pace=PACE), replace(idle, pace=PACE)], demand(key), load_factor=1.0)
    assert choice
    assert others < 3 or (choice.address, choice.reason) == (idle.address, "load")


@given(st.lists(keys, min_size=2, max_size=2, unique=True), addresses, st.integers(1, 100_000), st.integers(1, 100_000))
def test_two_prompts_sent_at_once_go_to_two_idle_endpoints_unless_the_first_is_short(
    both: list[bytes], names: list[str], first_tokens: int, second_tokens: int
) -> None:
    """Base prefills, which measure no steps; the second pick comes before any report tells of the first."""
    pace = Pace(compute_token_seconds=0.001)
    first, second = (
        Demand(key, {MODEL}, expected_tokens=tokens)
        for key, tokens in zip(both, (first_tokens, second_tokens), strict=True)
    )
    taken = picked([endpoint(name, pace=pace) for name in names], first, load_factor=2.0)
    sent = [
        endpoint(name, 1, pace=pace, expected_tokens={first.key: first_tokens})
        if name == taken
        else endpoint(name, pace=pace)
        for name in names
    ]
    # With so loose a bound, nothing but the tokens keeps the second from where the first is.
    chosen = picked(sent, second, load_factor=len(names) * 2.0)
    long = first_tokens * pace.compute_token_seconds > TIE_SECONDS
    assert (chosen != taken) == (len(names) > 1 and (long or rendezvous_order(second.key, names)[0] != taken))


@given(keys, addresses, st.integers(1, 100_000), st.integers(0, 5))
def test_requests_for_one_conversation_sent_at_once_stay_together(
    key: bytes, names: list[str], tokens: int, others: int
) -> None:
    pace = Pace(compute_token_seconds=0.001)
    wanted = Demand(key, {MODEL}, expected_tokens=tokens)
    taken = picked([endpoint(name, pace=pace) for name in names], wanted, load_factor=1.0)
    sent = [
        endpoint(name, 1, pace=pace, expected_tokens={key: tokens}) if name == taken else endpoint(name, pace=pace)
        for name in names
    ]
    assert picked(sent, wanted, load_factor=len(names) * 2.0) == taken


def test_noise_does_not_scatter_a_key_but_load_does() -> None:
    first, second = rendezvous_order(b"k", ["10.0.0.1:1", "10.0.0.1:2"])
    for slower, expected in ((1.05, first), (1.5, second)):
        noisy = [endpoint(first, pace=PACE._replace(step_seconds=0.1 * slower)), endpoint(second, pace=PACE)]
        noisy[1] = replace(noisy[1], pace=PACE._replace(step_seconds=0.1))
        assert picked(noisy, demand(), load_factor=1.25) == expected


@given(keys, st.integers(0, 6))
def test_the_longest_resident_prefix_counts_with_what_is_on_its_way(key: bytes, strides: int) -> None:
    held = endpoint("10.0.0.1:1", prefixes={*PREFIX[:2]}, coming_prefixes={*PREFIX[:strides]})
    assert held.resident_tokens(PREFIX[::-1]) == max(2, strides) * STRIDE_TOKENS
    assert held.resident_tokens(()) == 0


@pytest.mark.parametrize(
    ("in_flight", "reported", "at_report", "load"),
    [
        (3, 0, 0, 3),  # never reported
        (3, 5, 3, 5),  # two are another router's
        (4, 5, 3, 6),  # one picked since
        (1, 5, 3, 3),  # two ended since
        (4, 0, 4, 4),  # picked so shortly before the report that it had not arrived
    ],
)
def test_load_is_what_was_reported_and_what_changed_since(
    in_flight: int, reported: int, at_report: int, load: int
) -> None:
    changes = {"reported_load": reported, "in_flight_at_report": at_report}
    assert endpoint("10.0.0.1:1", in_flight, **changes).load == load


def test_a_new_endpoint_without_figures_is_neither_shunned_nor_flooded() -> None:
    old = [endpoint(f"10.0.0.1:{port}", 3, pace=PACE) for port in (1, 2)]
    fresh = endpoint("10.0.0.1:3", 3)
    shares = [picked([*old, fresh], demand(str(key).encode()), load_factor=1.25) for key in range(300)]
    assert 70 < shares.count("10.0.0.1:3") < 130


# --- fan-outs ---------------------------------------------------------------------------------------------------------


@given(fleets(), demands, st.integers(2, 100), factors)
def test_a_fan_out_fills_as_few_endpoints_as_the_bound_allows(
    endpoints: list[EndpointSnapshot], wanted: Demand, size: int, factor: float
) -> None:
    rooms = room(endpoints, replace(wanted, group_size=size), factor)
    loads = {e.address: e for e in endpoints}
    together: set[str] = set()
    for remaining in range(size, 0, -1):
        placed = replace(wanted, group_size=remaining, together=together)
        choice = pick(loads.values(), placed, load_factor=factor)
        if choice is None:
            assert not rooms
            return
        assert (choice.reason == "fan_out") == (choice.address in together)
        together.add(choice.address)
        taken = loads[choice.address]
        loads[choice.address] = replace(taken, in_flight=taken.in_flight + 1)
        rooms[choice.address] -= 1
    fewest, left = 0, size
    for free in sorted(room(endpoints, replace(wanted, group_size=size), factor).values(), reverse=True):
        if left > 0:
            fewest, left = fewest + 1, left - free
    assert len(together) == fewest
    assert all(rooms[address] >= 0 for address in together)


def test_a_fan_out_begins_where_its_prefix_is() -> None:
    endpoints = [endpoint(f"10.0.0.1:{port}", pace=PACE) for port in (1, 2, 3)]
    holder = replace(endpoints[1], prefixes={*PREFIX})
    for key in (b"a", b"b", b"c", b"d"):
        wanted = Demand(key, {MODEL}, group_size=5, fingerprints=PREFIX, prefix_tokens=1600)
        assert picked([endpoints[0], holder, endpoints[2]], wanted, load_factor=1.25) == holder.address


@pytest.mark.parametrize(
    ("loads", "key", "reason"),
    [({"10.0.0.1:1": 0}, b"k", "only"), ({"10.0.0.1:1": 0, "10.0.0.1:2": 0}, b"k", "affinity")],
)
def test_a_pick_says_why(loads: dict[str, int], key: bytes, reason: str) -> None:
    choice = pick([endpoint(name, load) for name, load in loads.items()], demand(key), load_factor=1.25)
    assert choice
    assert choice.reason == reason


def test_a_pick_says_that_load_moved_it() -> None:
    first, second = rendezvous_order(b"k", ["10.0.0.1:1", "10.0.0.1:2"])
    at_bound = pick([endpoint(first, 2), endpoint(second)], demand(), load_factor=1.25)
    assert at_bound == Pick(second, "load")
    slower = pick([endpoint(first, 9, pace=PACE), endpoint(second, 5, pace=PACE)], demand(), load_factor=2)
    assert slower == Pick(second, "load", 0.04 * (1 + 5 / 16))

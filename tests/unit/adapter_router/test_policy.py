"""Rendezvous hashing with bounded load: who is picked, who never is, and what moves when endpoints come and go."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_router.policy import (
    AFFINITY_TOKENS,
    Demand,
    EndpointSnapshot,
    adapter_key,
    conversation_key,
    eligible,
    load_bound,
    opening_key,
    pick,
    rendezvous_order,
)
from alora_serve.types import AdapterDigest, AdapterInfo, ChatMessage

MODEL = b"m" * 32
addresses = st.lists(st.integers(1, 65535).map(lambda port: f"10.0.0.1:{port}"), min_size=1, max_size=12, unique=True)
keys = st.binary(max_size=40)
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


@given(keys, addresses)
def test_order_depends_on_neither_input_order_nor_process(key: bytes, names: list[str]) -> None:
    assert rendezvous_order(key, names) == rendezvous_order(key, list(reversed(names)))
    assert sorted(rendezvous_order(key, names)) == sorted(names)


def test_order_is_the_same_in_another_process_with_another_hash_seed() -> None:
    names = [f"10.0.0.{i}:50051" for i in range(6)]
    code = f"from adapter_router.policy import *; print(rendezvous_order(adapter_key('jailbreak'), {names!r}))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {str(rendezvous_order(adapter_key("jailbreak"), names))}


@given(keys, addresses, st.data())
def test_a_leaving_endpoint_moves_only_what_it_held(key: bytes, names: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    before = rendezvous_order(key, names)
    after = rendezvous_order(key, [name for name in names if name != gone])
    assert after == [name for name in before if name != gone]


@given(keys, addresses)
def test_a_joining_endpoint_takes_a_key_or_leaves_it_where_it_was(key: bytes, names: list[str]) -> None:
    before = rendezvous_order(key, names)[0]
    assert rendezvous_order(key, [*names, "10.9.9.9:1"])[0] in {before, "10.9.9.9:1"}


def test_keys_spread_over_all_endpoints() -> None:
    names = [f"10.0.0.{i}:50051" for i in range(4)]
    first = Counter(rendezvous_order(adapter_key(f"adapter-{i}"), names)[0] for i in range(2000))
    assert set(first) == set(names)
    assert all(400 < count < 600 for count in first.values())  # fair share 500; the digest is fixed, so is this count


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


@given(keys, addresses, st.integers(2, 256), factors)
def test_a_fan_out_fills_as_few_endpoints_as_the_bound_allows(
    key: bytes, names: list[str], size: int, factor: float
) -> None:
    loads = dict.fromkeys(names, 0)
    for remaining in range(size, 0, -1):
        snapshots = [endpoint(name, load) for name, load in loads.items()]
        chosen = picked(snapshots, demand(key, group_size=remaining), load_factor=factor)
        assert chosen is not None
        loads[chosen] += 1
    bound = load_bound(0, len(names), factor, group_size=size)
    assert sum(load > 0 for load in loads.values()) == -(-size // bound)
    assert max(loads.values()) <= bound


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


def test_a_conversation_keeps_its_key_as_it_grows() -> None:
    tokens = tuple(range(AFFINITY_TOKENS))
    assert conversation_key(tokens) == conversation_key((*tokens, 7, 8, 9))
    assert conversation_key(tokens) != conversation_key((1, *tokens[1:]))


def test_an_opening_is_named_up_to_the_first_user_message() -> None:
    opening = [ChatMessage("system", "s"), ChatMessage("user", "q")]
    grown = [*opening, ChatMessage("assistant", "a"), ChatMessage("user", "r")]
    assert opening_key(opening) == opening_key(grown)
    assert opening_key(opening) != opening_key([ChatMessage("system", "sq"), ChatMessage("user", "")])

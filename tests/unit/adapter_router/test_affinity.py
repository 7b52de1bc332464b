"""Rendezvous hashing: the same order everywhere, and little moves when endpoints come and go."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from adapter_router.affinity import (
    AFFINITY_TOKENS,
    adapter_key,
    conversation_key,
    opening_key,
    rendezvous_order,
    rendezvous_weight,
)
from alora_serve.types import ChatMessage

addresses = st.lists(st.integers(1, 65535).map(lambda port: f"10.0.0.1:{port}"), min_size=1, max_size=12, unique=True)
keys = st.binary(max_size=40)


@given(keys, addresses)
def test_order_depends_on_neither_input_order_nor_process(key: bytes, names: list[str]) -> None:
    assert rendezvous_order(key, names) == rendezvous_order(key, list(reversed(names)))
    assert sorted(rendezvous_order(key, names)) == sorted(names)
    assert rendezvous_order(key, names)[0] == max(names, key=rendezvous_weight(key))


def test_order_is_the_same_in_another_process_with_another_hash_seed() -> None:
    names = [f"10.0.0.{i}:50051" for i in range(6)]
    code = f"from adapter_router.affinity import *; print(rendezvous_order(adapter_key('jailbreak'), {names!r}))"
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


def test_a_conversation_keeps_its_key_as_it_grows() -> None:
    tokens = tuple(range(AFFINITY_TOKENS))
    assert conversation_key(tokens) == conversation_key((*tokens, 7, 8, 9))
    assert conversation_key(tokens) != conversation_key((1, *tokens[1:]))


def test_an_opening_is_named_up_to_the_first_user_message() -> None:
    opening = [ChatMessage("system", "s"), ChatMessage("user", "q")]
    grown = [*opening, ChatMessage("assistant", "a"), ChatMessage("user", "r")]
    assert opening_key(opening) == opening_key(grown)
    assert opening_key(opening) != opening_key([ChatMessage("system", "sq"), ChatMessage("user", "")])

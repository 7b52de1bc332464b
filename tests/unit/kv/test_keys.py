"""No two different runs share a block name, equal runs share all of them, and neither depends on the process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.kv.keys import (
    BlockChain,
    BlockHash,
    RootFields,
    block_hash,
    digest_fields,
    part_key,
    root_hash,
    storage_digest,
)

ROOT = RootFields(
    weights_digest=b"w" * 32,
    forward_config_digest=b"c" * 32,
    compute_dtype="float32",
    weight_quantization="none",
    weight_layout="plain",
    device_type="cpu",
    kv_dtype="float32",
    kv_layout="layers=2;order=layer,kv,head,token,dim;kv_heads=1;head_dim=4",
    block_tokens=16,
    store_protection="none",
    deployment_salt=b"salt",
)
CHANGED: dict[str, object] = {
    "weights_digest": b"x" * 32,
    "forward_config_digest": b"d" * 32,
    "compute_dtype": "bfloat16",
    "weight_quantization": "int8",
    "weight_layout": "packed",
    "device_type": "cuda",
    "kv_dtype": "bfloat16",
    "kv_layout": "layers=3;order=layer,kv,head,token,dim;kv_heads=1;head_dim=4",
    "block_tokens": 32,
    "store_protection": "mac",
    "deployment_salt": b"",
}

# A change here is a change of schema: raise KEY_SCHEMA_VERSION with it, or old and new records get mixed up.
GOLDEN_ROOT = "fa8fa067d21f7862651babd6b151de8bafd6ec119caaa4cb36d62cbc39b0ef74"
GOLDEN_STORAGE = "3f19e28a779a914cbd7e2655c7f6505cc3b78fbddb0c46374ef95d810f68cd4c"
GOLDEN_SECOND_BLOCK = "9a42361a73ad4eef9bfd73b5103275ff897dde6d0774ee82b109178ddb7d9c6e"
GOLDEN_TAIL = "8dd30e1ea1c07b42d3ac2a95f266f7ccf87d7faaa6eececfe288dd2cec63f964"
GOLDEN_PART = "7d4bf0e3fc681eb4f783ee998ff06c657151f924a7376c3290e611a939b756f0"

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
small_tokens = st.lists(st.integers(0, 1), max_size=12)
roots = st.builds(
    RootFields,
    weights_digest=st.binary(max_size=2),
    forward_config_digest=st.binary(max_size=2),
    compute_dtype=st.text("ab", max_size=2),
    weight_quantization=st.text("ab", max_size=2),
    weight_layout=st.text("ab", max_size=2),
    device_type=st.text("ab", max_size=2),
    kv_dtype=st.text("ab", max_size=2),
    kv_layout=st.text("ab", max_size=2),
    block_tokens=st.integers(1, 4),
    store_protection=st.text("ab", max_size=2),
    deployment_salt=st.binary(max_size=2),
)


def _chain(token_ids: list[int], root: RootFields = ROOT) -> BlockChain:
    return BlockChain(root_hash(root), token_ids, root.block_tokens)


def _names(chain: BlockChain) -> dict[int, BlockHash]:
    """Every name there is for a prefix of the chain's tokens, by the position where it ends."""
    return {end: chain.name_of(end) for end in range(1, len(chain) + 1)}


@pytest.mark.parametrize("name", [item.name for item in fields(RootFields)])
def test_each_root_field_changes_every_name(name: str) -> None:
    changed = replace(ROOT, **{name: CHANGED[name]})
    assert root_hash(changed) != root_hash(ROOT)
    token_ids = list(range(40))
    assert not set(_names(_chain(token_ids)).values()) & set(_names(_chain(token_ids, changed)).values())


def test_the_storage_digest_covers_all_that_the_model_digest_does_not() -> None:
    """Routers pair endpoints by the model digest and expect shared blocks only where this one is equal too."""
    for item in fields(RootFields):
        changed = storage_digest(replace(ROOT, **{item.name: CHANGED[item.name]})) != storage_digest(ROOT)
        assert changed == (item.name not in {"weights_digest", "forward_config_digest"}), item.name


@given(roots, small_tokens, roots, small_tokens)
def test_different_roots_or_tokens_never_share_a_name(
    root_a: RootFields, tokens_a: list[int], root_b: RootFields, tokens_b: list[int]
) -> None:
    names_a, names_b = _names(_chain(tokens_a, root_a)), _names(_chain(tokens_b, root_b))
    for end_a, name_a in names_a.items():
        for end_b, name_b in names_b.items():
            same = root_a == root_b and tokens_a[:end_a] == tokens_b[:end_b]
            assert (name_a == name_b) == same


@given(tokens)
def test_no_two_blocks_or_tails_of_one_chain_share_a_name(token_ids: list[int]) -> None:
    names = list(_names(_chain(token_ids)).values())
    assert len(set(names)) == len(names)


@given(
    st.lists(
        st.tuples(st.text(max_size=3), st.one_of(st.binary(max_size=3), st.text(max_size=3), st.integers())),
        max_size=3,
    ),
    st.lists(
        st.tuples(st.text(max_size=3), st.one_of(st.binary(max_size=3), st.text(max_size=3), st.integers())),
        max_size=3,
    ),
)
def test_fields_are_told_apart_by_name_type_and_length(
    some: list[tuple[str, bytes | str | int]], others: list[tuple[str, bytes | str | int]]
) -> None:
    assert (digest_fields("d", *some) == digest_fields("d", *others)) == (some == others)


def test_a_number_its_text_and_its_bytes_are_three_values() -> None:
    values: list[bytes | str | int] = [16, "16", b"16"]
    assert len({digest_fields("d", ("f", value)) for value in values}) == 3
    assert digest_fields("d", ("a", "bc")) != digest_fields("d", ("ab", "c")) != digest_fields("da", ("b", "c"))


def test_token_ids_are_four_bytes_each_so_that_no_two_lists_run_together() -> None:
    parent = BlockHash(bytes(32))
    assert block_hash(parent, [1, 0]) != block_hash(parent, [1])
    assert block_hash(parent, [256]) != block_hash(parent, [1, 0])
    with pytest.raises(OverflowError):
        block_hash(parent, [2**32])


@given(tokens, st.integers(0, 40))
def test_a_tail_is_a_leaf(token_ids: list[int], cut: int) -> None:
    """What a conversation goes on with never changes or reuses the name of a tail on its way: full chains skip it."""
    cut = min(cut, len(token_ids))
    shorter, longer = _chain(token_ids[:cut]), _chain(token_ids)
    assert longer.full[: len(shorter.full)] == shorter.full
    if shorter.tail_tokens:
        tail = shorter.name_of(cut)
        assert tail == longer.tail(len(shorter.full), shorter.tail_tokens)
        assert tail not in longer.full
        parents = [root_hash(ROOT), *longer.full]
        for index, name in enumerate(longer.full):
            start = index * ROOT.block_tokens
            assert name == block_hash(parents[index], token_ids[start : start + ROOT.block_tokens])


def test_a_tail_is_shorter_than_a_block_and_not_empty() -> None:
    chain = _chain(list(range(40)))
    for count in (0, 16):
        with pytest.raises(ValueError, match="1 to 15"):
            chain.tail(0, count)


def test_a_tail_beyond_the_tokens_is_refused() -> None:
    """Cut to what there is, it would carry the name of a shorter one."""
    chain = _chain(list(range(40)))
    assert chain.tail(2, 8)
    with pytest.raises(ValueError, match="ends at 41 reaches beyond the 40 tokens"):
        chain.tail(2, 9)


@given(tokens, tokens)
def test_extending_a_chain_equals_building_it_from_scratch(first: list[int], more: list[int]) -> None:
    before = _chain(first)
    names = _names(before)
    extended, built = before.extended(more), _chain(first + more)
    assert extended.tokens == built.tokens
    assert extended.full == built.full
    assert _names(extended) == _names(built)
    assert _names(before) == names
    assert len(extended) == len(first) + len(more)
    assert extended.tail_tokens == (len(first) + len(more)) % ROOT.block_tokens


@given(tokens, st.integers(0, 3))
def test_a_block_has_as_many_keys_as_parts_and_none_is_its_name(token_ids: list[int], part: int) -> None:
    for name in _names(_chain(token_ids)).values():
        assert part_key(name, part) != name
        assert part_key(name, part) != part_key(name, part + 1)


def _golden() -> tuple[str, ...]:
    chain = _chain(list(range(37)))
    return tuple(
        name.hex()
        for name in (
            root_hash(ROOT),
            storage_digest(ROOT),
            chain.full[1],
            chain.name_of(37),
            part_key(chain.full[1], 1),
        )
    )


def test_names_are_those_that_earlier_releases_stored_under() -> None:
    assert _golden() == (GOLDEN_ROOT, GOLDEN_STORAGE, GOLDEN_SECOND_BLOCK, GOLDEN_TAIL, GOLDEN_PART)


@given(small_tokens, small_tokens, st.sampled_from([b"", b"one"]), st.sampled_from([b"", b"one", b"two"]), st.data())
def test_chains_have_in_common_what_has_one_name_in_both(
    one: list[int], other: list[int], salt: bytes, other_salt: bytes, data: st.DataObject
) -> None:
    public = data.draw(st.integers(0, min(len(one), len(other)))) if one == other else 0
    first = BlockChain(BlockHash(b"r" * 32), one, 4, tenant_salt=salt, public_tokens=public)
    second = BlockChain(BlockHash(b"r" * 32), other, 4, tenant_salt=other_salt, public_tokens=public)
    ends = range(1, min(len(one), len(other)) + 1)
    same = [end for end in ends if first.name_of(end) == second.name_of(end)]
    assert first.common_tokens(second) == second.common_tokens(first) == len(same)
    assert same == list(range(1, len(same) + 1))


@pytest.mark.parametrize("seed", ["0", "1"])
def test_names_do_not_depend_on_the_process(seed: str) -> None:
    """Python's own ``hash`` does, which is why no store was ever hit by keys made of it."""
    script = (
        "from alora_serve.kv.keys import *; r = RootFields(b'w', b'c', 'f', 'n', 'p', 'd', 'f', 'l', 4, 'none', b's');"
        "print(BlockChain(root_hash(r), range(11), 4).name_of(11).hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    root = RootFields(b"w", b"c", "f", "n", "p", "d", "f", "l", 4, "none", b"s")
    assert printed.stdout.strip() == BlockChain(root_hash(root), range(11), 4).name_of(11).hex()


# --- tenants ----------------------------------------------------------------------------------------------------------

salts = st.sampled_from([b"", b"one", b"other"])


def _tenants_chain(token_ids: list[int], salt: bytes, public: int = 0) -> BlockChain:
    return BlockChain(root_hash(ROOT), token_ids, 4, tenant_salt=salt, public_tokens=public)


@given(small_tokens, salts, salts)
def test_tenants_share_no_name_whatever_they_say(token_ids: list[int], one: bytes, other: bytes) -> None:
    names, others = (set(_names(_tenants_chain(token_ids, salt)).values()) for salt in (one, other))
    assert names == others if one == other else not names & others


@given(st.lists(st.integers(0, 1), min_size=1, max_size=24), st.integers(0, 24), st.sampled_from([b"one", b"other"]))
def test_what_is_public_is_shared_up_to_its_last_whole_block_and_nothing_after(
    token_ids: list[int], public: int, salt: bytes
) -> None:
    public = min(public, len(token_ids))
    everyones, tenants = _names(_tenants_chain(token_ids, b"")), _names(_tenants_chain(token_ids, salt, public))
    strangers = _names(_tenants_chain(token_ids, b"stranger", public))
    for end, name in tenants.items():
        is_shared = end <= public // 4 * 4
        assert (name == everyones[end]) == is_shared
        assert (name == strangers[end]) == is_shared


@given(st.lists(st.integers(0, 1), max_size=24), st.integers(0, 24), salts, st.integers(0, 24))
def test_a_chain_cut_short_or_grown_names_what_one_from_scratch_does(
    token_ids: list[int], cut: int, salt: bytes, public: int
) -> None:
    cut = min(cut, len(token_ids))
    whole, part = _tenants_chain(token_ids, salt, public), _tenants_chain(token_ids[:cut], salt, public)
    assert _names(whole.first(cut)) == _names(part)
    assert _names(part.extended(token_ids[cut:])) == _names(whole)
    assert whole.first(cut).tenant_salt == salt

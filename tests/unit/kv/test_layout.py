"""Blocks are cut so that no stored part passes a mebibyte where one layer allows, whole layers at a time."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.kv.layout import MAX_BLOCK_TOKENS, MIN_BLOCK_TOKENS, PART_BYTES, KVLayout

layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 128),
    kv_heads=st.integers(1, 128),
    head_dim=st.integers(1, 512),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


def test_bytes_of_a_token_are_those_of_known_models() -> None:
    assert KVLayout(30, 3, 64, "bfloat16").bytes_per_token == 23040  # SmolLM2-135M
    assert KVLayout(32, 8, 128, "bfloat16").bytes_per_token == 131072  # Llama-3.1-8B
    assert KVLayout(32, 8, 128, "float32").bytes_per_token == 262144


def test_a_dtype_without_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="'int8' is not one of"):
        KVLayout(1, 1, 1, "int8")


@given(layouts)
def test_default_blocks_are_a_power_of_two_whose_kv_fits_a_part_where_any_would(layout: KVLayout) -> None:
    tokens = layout.default_block_tokens()
    assert MIN_BLOCK_TOKENS <= tokens <= MAX_BLOCK_TOKENS
    assert tokens & (tokens - 1) == 0
    assert tokens * layout.bytes_per_token <= PART_BYTES or tokens == MIN_BLOCK_TOKENS
    assert 2 * tokens * layout.bytes_per_token > PART_BYTES or tokens == MAX_BLOCK_TOKENS


@given(layouts, st.integers(1, 256))
def test_parts_hold_every_layer_once_and_pass_the_limit_only_for_a_single_layer(
    layout: KVLayout, block_tokens: int
) -> None:
    groups = layout.layer_groups(block_tokens)
    assert [layer for group in groups for layer in group] == list(range(layout.layers))
    for group in groups:
        assert len(group) == 1 or len(group) * block_tokens * layout.bytes_per_layer_token <= PART_BYTES


@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim"])
def test_the_canonical_name_changes_with_every_field_of_the_shape(name: str) -> None:
    layout = KVLayout(2, 3, 4, "float32")
    assert replace(layout, **{name: 9}).canonical() != layout.canonical()
    assert {item.name for item in fields(KVLayout)} == {"layers", "kv_heads", "head_dim", "dtype"}
    # The dtype has a field of its own in the key root.
    assert replace(layout, dtype="bfloat16").canonical() == layout.canonical()

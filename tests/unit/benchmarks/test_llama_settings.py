from __future__ import annotations

import dataclasses

import lineup
import pytest
from systems.llama_trials import AS_IN_TABLES, TRIALS


@pytest.mark.parametrize(("dtype", "cache"), [("float32", "f32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("name", [name for name in lineup.LLAMA if name != "llama-f16"])
def test_llama_server_keeps_kv_in_the_dtype_that_all_systems_compute_in(name: str, dtype: str, cache: str) -> None:
    flags = lineup.LLAMA[name].all_flags(dtype)

    assert flags[flags.index("--cache-type-k") + 1] == cache
    assert flags[flags.index("--cache-type-v") + 1] == cache


@pytest.mark.parametrize(
    ("dtype", "device", "is_off"),
    [("float32", "cpu", True), ("float32", "cuda", True), ("bfloat16", "cpu", True), ("bfloat16", "cuda", False)],
)
def test_flash_attention_is_off_where_it_would_take_longer_or_copy_to_half_precision(
    dtype: str, device: str, is_off: bool
) -> None:
    flags = lineup.LLAMA["llama"].all_flags(dtype, device)

    assert ("--flash-attn" in flags and flags[flags.index("--flash-attn") + 1] == "off") == is_off


def test_half_precision_is_the_best_case_in_all_else() -> None:
    half, best = lineup.LLAMA["llama-f16"], lineup.LLAMA["llama"]

    assert dataclasses.replace(half, name=best.name, kv_flags=None) == best
    assert half.all_flags("float32").count("f16") == 2


def test_on_a_gpu_all_layers_are_there() -> None:
    assert "--n-gpu-layers" in lineup.LLAMA["llama"].all_flags("bfloat16", "cuda")
    assert "--n-gpu-layers" not in lineup.LLAMA["llama"].all_flags("bfloat16", "cpu")


@pytest.mark.parametrize(("way", "name"), [("serial", "llama"), ("five", "llama-5-best"), ("eight", "llama-8-best")])
def test_what_is_tried_is_compared_with_what_the_tables_have(way: str, name: str) -> None:
    first, *others = TRIALS[way]

    assert dataclasses.replace(first, name="") == dataclasses.replace(lineup.LLAMA[name], name="")
    assert first.name == AS_IN_TABLES
    names = [settings.name for settings in TRIALS[way]]
    assert len(set(names)) == len(names)
    assert all(dataclasses.replace(other, name="") != dataclasses.replace(first, name="") for other in others)

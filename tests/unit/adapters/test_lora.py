"""An adapter in memory holds what PEFT would hold of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from alora_serve.adapters.files import find_files
from alora_serve.adapters.loading import AdapterHost, load_adapter
from alora_serve.adapters.lora import LoadedAdapter

INVOCATION = [40, 41]

DTYPES = [torch.float32, torch.bfloat16]


def load(directory: Path, base: AdapterHost) -> LoadedAdapter:
    files = find_files(directory, root=directory)
    return load_adapter(files, name=directory.name, base=base)


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_held_as_peft_holds_them(
    file_dtype: torch.dtype,
    base_dtype: torch.dtype,
    tmp_path: Path,
    save_adapter: Callable[..., Path],
    llama: AdapterHost,
    fresh_model: Callable[..., PreTrainedModel],
) -> None:
    directory = save_adapter(tmp_path / "x", dtype=file_dtype)
    reference = peft.PeftModel.from_pretrained(fresh_model("llama", base_dtype), str(directory)).base_model.model
    adapter = load(directory, llama)
    layers = {name: module for name, module in reference.named_modules() if isinstance(module, LoraLayer)}
    assert adapter.pairs.keys() == layers.keys()
    for name, layer in layers.items():
        pair = adapter.pairs[name]
        for ours, theirs in [(pair.a, layer.lora_A["default"].weight), (pair.b, layer.lora_B["default"].weight)]:
            assert ours.dtype == theirs.dtype == torch.float32
            assert torch.equal(ours, theirs)
        assert pair.scaling == layer.scaling["default"]
    assert adapter.size_bytes == sum(t.nbytes for pair in adapter.pairs.values() for t in (pair.a, pair.b))


def test_a_loaded_adapter_says_what_it_is(
    tmp_path: Path, save_adapter: Callable[..., Path], llama: AdapterHost
) -> None:
    fields: dict[str, Any] = {"alora_invocation_tokens": INVOCATION, "rank_pattern": {"v_proj": 6}}
    adapter = load(save_adapter(tmp_path / "certainty", **fields), llama)
    assert adapter.invocation_tokens == (40, 41)
    assert adapter.info.invocation_text == "<40> <41>"
    assert (adapter.info.name, adapter.info.kind, adapter.info.rank) == ("certainty", "alora", 6)
    assert adapter.info.target_modules == ("q_proj", "v_proj")
    assert adapter.digest == adapter.info.digest
    assert adapter.size_bytes == 3 * 4 * (4 * (32 + 32) + 6 * (32 + 16))

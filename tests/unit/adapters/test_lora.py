"""The delta against real PEFT models, bit for bit: aLoRA and plain LoRA, float32 and bfloat16, Linear and Conv1D."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from alora_serve.adapters.files import find_files
from alora_serve.adapters.loading import AdapterHost, load_adapter
from alora_serve.adapters.lora import LoadedAdapter, LoraPair, add_delta_, lora_delta

PROMPT = torch.tensor([[5, 9, 3, 11, 40, 41, 8, 3, 40, 41, 6, 7]])
INVOCATION = [40, 41]
INVOCATION_START = 8

DTYPES = [torch.float32, torch.bfloat16]


def load(directory: Path, base: AdapterHost) -> LoadedAdapter:
    files = find_files(directory, root=directory)
    return load_adapter(files, name=directory.name, base=base)


def logits_with(model: PreTrainedModel, adapter: LoadedAdapter, start: int) -> Tensor:
    """The base model's logits for PROMPT, with our delta added to rows ``[start, end)`` of every adapted module."""

    def hook(pair: LoraPair) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            add_delta_(output[0, start:], args[0][0, start:], pair)

        return add

    for name, pair in adapter.pairs.items():
        model.get_submodule(name).register_forward_hook(hook(pair))
    with torch.inference_mode():
        return model(input_ids=PROMPT).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2", "gpt2"])
@pytest.mark.parametrize("kind", ["alora", "lora"])
def test_logits_are_bit_equal_to_pefts(
    kind: str,
    architecture: str,
    dtype: torch.dtype,
    tmp_path: Path,
    save_adapter: Callable[..., Path],
    base_of: Callable[[str], AdapterHost],
    fresh_model: Callable[..., PreTrainedModel],
) -> None:
    tokens = INVOCATION if kind == "alora" else None
    directory = save_adapter(tmp_path / kind, architecture, target_modules="all-linear", alora_invocation_tokens=tokens)
    adapter = load(directory, base_of(architecture))
    reference = peft.PeftModel.from_pretrained(fresh_model(architecture, dtype), str(directory)).eval()
    with torch.inference_mode():
        expected = reference(input_ids=PROMPT).logits
    start = INVOCATION_START if kind == "alora" else 0
    assert torch.equal(logits_with(fresh_model(architecture, dtype), adapter, start), expected)
    # What the equality above is worth: one token early or late, and the base model, differ.
    for wrong in {0, start - 1, start + 1, PROMPT.shape[1]} - {start, -1}:
        assert not torch.equal(logits_with(fresh_model(architecture, dtype), adapter, wrong), expected)


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


def a_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor, LoraPair]:
    torch.manual_seed(3)
    x = torch.randn(64, 32, dtype=dtype)
    output = torch.randn(64, 48, dtype=dtype)
    return x, output, LoraPair(a=torch.randn(4, 32), b=torch.randn(48, 4), scaling=3.0 / 7.0)


def peft_layer(pair: LoraPair, output: Tensor, *, alora: bool) -> LoraLayer:
    """A real PEFT layer of ``pair`` over a base module that answers ``output``, whatever its input."""

    class Answer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return output.clone()

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Answer(pair.a.shape[1], pair.b.shape[0], bias=False, dtype=output.dtype)

    config = peft.LoraConfig(target_modules=["proj"], r=4, alora_invocation_tokens=[1] if alora else None)
    layer = peft.inject_adapter_in_model(config, Host()).proj
    layer.lora_A["default"].weight = nn.Parameter(pair.a)
    layer.lora_B["default"].weight = nn.Parameter(pair.b)
    layer.scaling["default"] = pair.scaling
    return layer.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_and_activated_lora_round_alike_and_so_do_we(dtype: torch.dtype) -> None:
    x, output, pair = a_pair(dtype)
    with torch.no_grad():
        plain = peft_layer(pair, output, alora=False)(x)
        activated = peft_layer(pair, output.unsqueeze(0), alora=True)(x.unsqueeze(0), alora_offsets=[64])[0]
    ours = output.clone()
    add_delta_(ours, x, pair)
    assert plain.dtype == activated.dtype == ours.dtype == dtype
    assert torch.equal(plain, activated)
    assert torch.equal(ours, plain)


def delta_rounded_before_adding(x: Tensor, output: Tensor, pair: LoraPair) -> Tensor:
    return output + lora_delta(x, pair).to(output.dtype)


def delta_in_the_base_dtype(x: Tensor, output: Tensor, pair: LoraPair) -> Tensor:
    return output + linear(linear(x, pair.a.to(x.dtype)), pair.b.to(x.dtype)) * pair.scaling


def scaling_before_b(x: Tensor, output: Tensor, pair: LoraPair) -> Tensor:
    return output + linear(linear(x, pair.a) * pair.scaling, pair.b)


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (delta_rounded_before_adding, torch.bfloat16),
        (delta_in_the_base_dtype, torch.bfloat16),
        (scaling_before_b, torch.float32),
    ],
)
def test_other_roundings_differ_from_peft(wrong: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, output, pair = a_pair(dtype)
    right = output.clone()
    add_delta_(right, x, pair)
    assert not torch.equal(wrong(x, output, pair), right), "then this simpler rounding would do"


def test_rows_outside_the_view_keep_their_base_output() -> None:
    x, output, pair = a_pair(torch.bfloat16)
    adapted = output.clone()
    add_delta_(adapted[10:20], x[10:20], pair)
    assert torch.equal(adapted[:10], output[:10])
    assert torch.equal(adapted[20:], output[20:])
    assert not torch.equal(adapted[10:20], output[10:20])


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

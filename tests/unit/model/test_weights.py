"""Layouts hold the model's own values, and multiply as exactly as float32 does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from alora_serve.model.weights import (
    INT8_ROWS,
    HalfWeights,
    Int8Weights,
    PackedWeights,
    PlainWeights,
    WeightLayout,
    best_layout,
    lay_out,
)

torch.set_num_threads(1)
CPU = torch.device("cpu")
FASTEST = best_layout(torch.float32, CPU)
needs_half = pytest.mark.skipif(FASTEST != "half", reason="this torch has no FBGEMM kernels")


def _checkpoint(*shape: int, spread: float = 1.0) -> torch.Tensor:
    """Weights as a bfloat16 checkpoint has them, in float32."""
    torch.manual_seed(3)
    return (torch.randn(shape) * 0.02 * spread).bfloat16().float()


@pytest.mark.parametrize("rows", [1, 5, 16, 70])
@pytest.mark.parametrize("layout", ["plain", "packed", "half"])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_float32s(layout: WeightLayout, rows: int, bias: bool) -> None:
    if layout != "plain" and FASTEST == "plain":
        pytest.skip("this torch has no oneDNN kernels")
    parts, biases = [_checkpoint(96, 576), _checkpoint(40, 576)], [torch.randn(96), torch.randn(40)]
    weights = lay_out(parts, biases if bias else [None, None], layout if layout != "half" else FASTEST)
    x = torch.randn(rows, 576)
    exact = linear(x.double(), torch.cat(parts).double(), torch.cat(biases).double() if bias else None)
    assert (weights.product(x).double() - exact).abs().max() < 4e-6 * exact.abs().max()


@needs_half
def test_a_checkpoint_in_bfloat16_is_read_in_half_the_bytes() -> None:
    weight = _checkpoint(96, 576)
    assert isinstance(lay_out([weight], [None], "half"), HalfWeights)
    assert lay_out([weight], [None], "half").bytes_read * 2 == weight.nbytes


@needs_half
@given(st.integers(-60, 60), st.integers(0, 9))
def test_every_value_is_kept_or_the_layout_is_not_taken(exponent: int, seed: int) -> None:
    """The unit vectors' products are the weights themselves: what was rounded would show."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(24, 16, generator=generator) * 2.0**exponent).bfloat16().float()
    half = HalfWeights.of(weight, None)
    assert half is not None, "16 bits hold a bfloat16 matrix of any magnitude whose values lie near each other"
    assert torch.equal(half.product(torch.eye(16)), weight.t())


@needs_half
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(1.0 + 2**-11, id="more digits than float16 has"),
        pytest.param(2.0**-40, id="far smaller than the largest"),
    ],
)
def test_a_matrix_that_would_lose_a_bit_is_packed_in_32(value: float) -> None:
    weight = _checkpoint(32, 16)
    weight[0, 0] = 1.0
    assert isinstance(lay_out([weight], [None], "half"), HalfWeights)
    weight[5, 7] = value * (1 + 2**-7)
    weights = lay_out([weight], [None], "half")
    assert isinstance(weights, PackedWeights)
    assert torch.allclose(weights.product(torch.eye(16)), weight.t(), atol=0, rtol=1e-7)


@needs_half
def test_zeros_and_infinities() -> None:
    zeros = lay_out([torch.zeros(8, 8)], [None], "half")
    assert not zeros.product(torch.randn(3, 8)).any()
    assert not isinstance(lay_out([torch.full((8, 8), float("inf"))], [None], "half"), HalfWeights)


def test_a_tied_output_layer_still_is_the_embedding_when_plain() -> None:
    weight = _checkpoint(32, 16)
    plain = lay_out([weight], [None], "plain")
    assert isinstance(plain, PlainWeights)
    assert plain.weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_and_a_processor_without_kernels_keep_weights_plain(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert best_layout(dtype, torch.device("cuda", 0)) == "plain"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert best_layout(dtype, CPU) == "plain"


def test_without_fbgemm_weights_are_packed_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if FASTEST == "plain":
        pytest.skip("this torch has no oneDNN kernels")
    monkeypatch.setattr("alora_serve.model.weights._has_fbgemm", lambda: False)
    assert best_layout(torch.float32, CPU) == "packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 576), (33, 17), (320, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_products_are_near_those_of_the_weights(dtype: torch.dtype, shape: tuple[int, int], bias: bool) -> None:
    weight, x = _checkpoint(*shape).to(dtype), torch.randn(INT8_ROWS + 1, shape[1]).to(dtype)
    given = torch.randn(shape[0]).to(dtype) if bias else None
    weights = lay_out([weight], [given], "plain", "int8")
    assert isinstance(weights, Int8Weights)
    assert weights.bytes_read == weight.numel()
    exact = linear(x.double(), weight.double(), None if given is None else given.double())
    many, few = weights.product(x), weights.product(x[:INT8_ROWS])
    assert many.dtype == few.dtype == dtype
    scale = exact.square().mean().sqrt()
    assert (many.double() - exact).square().mean().sqrt() < 0.01 * scale
    # Both kernels multiply by the same weights; the one for few rows rounds activations to bfloat16.
    assert (few.double() - many[:INT8_ROWS].double()).square().mean().sqrt() < 0.005 * scale


def test_int8_keeps_each_outputs_own_scale() -> None:
    """One step for the whole matrix would round the small rows to nothing."""
    weight = _checkpoint(4, 64) * torch.tensor([1.0, 1e-3, 1e3, 0.0]).unsqueeze(1)
    weights = Int8Weights(weight, None)
    assert weights._integers.abs().amax(dim=1).tolist() == pytest.approx([126, 126, 126, 0], abs=1)
    found = weights.product(torch.eye(64)).t()
    assert ((found - weight).abs().amax(dim=1) <= weight.abs().amax(dim=1) / 127).all()

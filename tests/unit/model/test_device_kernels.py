"""A fused kernel is used only if it answers as float64 does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alora_serve.model.device import CPU, open_device
from alora_serve.model.device_kernels import Kernel, choose_kernel, fused_kernel

torch.set_num_threads(1)
HEAD_DIM = 16


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out, lse


def rounds_like_tf32(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    def short(tensor: Tensor) -> Tensor:
        return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    return exact(short(query), short(key), short(value), scale, causal)


def forgets_causality(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return exact(query, key, value, scale, False)


def pads_its_log_sum_exp(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = exact(query, key, value, scale, causal)
    return out, torch.nn.functional.pad(lse, (0, 1))


def answers_nan(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = exact(query, key, value, scale, causal)
    return out * float("nan"), lse


def takes_nothing(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel for this dtype")


WRONG: list[Kernel] = [rounds_like_tf32, forgets_causality, pads_its_log_sum_exp, answers_nan, takes_nothing]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_is_wrong_is_passed_over(wrong: Kernel) -> None:
    assert choose_kernel({"wrong": wrong, "right": exact}, CPU, torch.float32, HEAD_DIM) is exact
    assert choose_kernel({"wrong": wrong}, CPU, torch.float32, HEAD_DIM) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_right_kernel_is_taken(dtype: torch.dtype) -> None:
    assert choose_kernel({"first": exact, "second": takes_nothing}, CPU, dtype, HEAD_DIM) is exact


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_gpu_has_a_fused_kernel(dtype: torch.dtype, head_dim: int) -> None:
    """Without one every score is written to memory: right, and slow."""
    assert fused_kernel(open_device("cuda"), dtype, head_dim) is not None

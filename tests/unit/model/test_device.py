"""A device is there, or the start ends with what is missing and what to do."""

from __future__ import annotations

import pytest
import torch

from alora_serve.errors import ConfigError
from alora_serve.model.device import CPU, device_name, native_dtype, open_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_torch_without_cuda_is_told_apart_from_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ConfigError, match=r"device='cuda': torch \S+ was built without CUDA; install a CUDA build"):
        open_device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device='cuda': torch sees no GPU; look at nvidia-smi"):
        open_device("cuda")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_known_by_its_number() -> None:
    assert open_device("cuda") == torch.device("cuda", 0)
    assert open_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"device='cuda:2': torch sees cuda:0 to cuda:1"):
        open_device("cuda:2")


@pytest.mark.usefixtures("two_gpus")
def test_float32_on_a_gpu_is_no_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        open_device("cpu")
        assert torch.get_float32_matmul_precision() == "high"
        open_device("cuda")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_processor_needs_nothing() -> None:
    assert open_device("cpu") == CPU
    assert device_name(CPU) == "cpu"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((10, 0), "bfloat16")])
def test_a_gpus_dtype_is_what_it_multiplies(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert native_dtype(torch.device("cuda", 0)) == dtype


def test_a_gpu_is_shown_with_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    assert device_name(torch.device("cuda", 1)) == "cuda:1 (NVIDIA H100)"

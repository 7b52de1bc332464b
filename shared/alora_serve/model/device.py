"""Where the model runs: the device that a setting names, checked before anything is loaded onto it."""

from __future__ import annotations

import torch

from alora_serve.errors import ConfigError

CPU = torch.device("cpu")


def open_device(name: str) -> torch.device:
    """The device of a setting, a GPU by its number.

    Float32 products stay float32 on a GPU: TF32, which an environment may ask for, keeps 10 bits of 23.

    Args:
        name: ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``.

    Raises:
        ConfigError: torch was built without CUDA, or there is no such GPU.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return CPU
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call] # torch's own lack
        raise ConfigError(
            f"device={name!r}: torch {torch.__version__} was built without CUDA; install a CUDA build of torch, or set "
            "device to cpu"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        found = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0 alone" if count else "no GPU"
        raise ConfigError(
            f"device={name!r}: torch sees {found}; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or set device to cpu"
        )
    torch.set_float32_matmul_precision("highest")
    return torch.device(device.type, index)


def native_dtype(device: torch.device) -> str:
    """``bfloat16`` where the device multiplies it natively, else ``float32``."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    # oneDNN emulates bf16 with avx512 alone, slower than fp32; only the dot-product instructions pay.
    capabilities = torch.cpu.get_capabilities()
    fast = ("avx512_bf16", "amx_bf16", "bf16")
    return "bfloat16" if any(capabilities.get(name) for name in fast) else "float32"


def device_name(device: torch.device) -> str:
    """As people know it: ``cpu``, or ``cuda:0 (NVIDIA H100 80GB HBM3)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

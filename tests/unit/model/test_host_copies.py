"""What was copied is there after ``finish``, though the source was overwritten right after each copy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alora_serve.model.device import CPU, open_device
from alora_serve.model.host_copies import STAGED_BYTES, host_copies

PARTS, LAYERS, TOKENS = 24, 3, 16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("head_dim", [8, STAGED_BYTES // (LAYERS * TOKENS)])  # the second outgrows the pinned buffers
def test_parts_arrive_from_sources_that_are_gone(device: str, head_dim: int) -> None:
    target = torch.zeros(LAYERS, PARTS * TOKENS, head_dim, device=open_device(device))
    copies = host_copies(target.device)
    copies.begin()

    def copy(part: int) -> None:
        source = torch.full((LAYERS, TOKENS, head_dim), float(part))
        copies.copy(source, target[:, part * TOKENS : (part + 1) * TOKENS])
        source.fill_(-1.0)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(copy, range(PARTS)))
    copies.finish()
    expected = torch.arange(PARTS, dtype=torch.float32).repeat_interleave(TOKENS)
    assert torch.equal(target.cpu(), expected[None, :, None].expand(target.shape))


def test_a_processor_needs_no_staging() -> None:
    """Nothing is pinned, and no CUDA context made, where KV lies in host memory."""
    assert type(host_copies(CPU)).__name__ == "DirectCopies"

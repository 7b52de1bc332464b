"""What of a process's surroundings decides how its threads wait for each other and what its allocator keeps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

_PREFIXES: Final = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_")


def thread_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that OpenMP, MKL and the allocator read."""
    return {name: value for name, value in sorted(environment.items()) if name.startswith(_PREFIXES)}


def torch_threads() -> int:
    """As many threads as torch computes with in this process; 0 where it is not loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else 0

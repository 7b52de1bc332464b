"""How many cores a process may use, in a container, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path


def usable_cores(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: those that it may run on, or fewer where its time is limited to less (``--cpus``).

    Args:
        membership: which control groups it is in, on Linux.
        root: where they are.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    limits = (cores_of(quota) for quota in _quotas(_text(membership), root))
    return min([len(os.sched_getaffinity(0)), *(ceil(limit) for limit in limits if limit is not None)])


def cores_of(quota: str) -> float | None:
    """What ``cpu.max`` comes to, or ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``: time in each period, both in us.

    None where there is no limit: ``max``, or below 0.
    """
    allowed, period = quota.split()
    return None if allowed == "max" or int(allowed) < 0 else int(allowed) / int(period)


def _quotas(membership: str, root: Path) -> Iterator[str]:
    """The quotas of these control groups and all above them. In a container, those above its own are not to be seen."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        files: tuple[str, ...]
        if not controllers:
            bases, files = (root, root / "unified"), ("cpu.max",)
        elif "cpu" in controllers.split(","):
            bases, files = (root / "cpu", root / controllers), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        parts = path.strip("/").split("/")
        for group in (base.joinpath(*parts[:count]) for base in bases for count in range(len(parts) + 1)):
            texts = [_text(group / file) for file in files]
            if all(texts):
                yield " ".join(texts)


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""

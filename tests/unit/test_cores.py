from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alora_serve import cores


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", None),
        ("200000 100000", 2),
        ("150000 100000\n", 1.5),
        ("-1\n 100000\n", None),
        ("50000\n 25000\n", 2),
    ],
)
def test_a_quota_is_cores_worth_of_time(quota: str, expected: float | None) -> None:
    assert cores.cores_of(quota) == expected


V2 = {"cpu.max": "{} 100000\n"}
V1 = {"cpu.cfs_quota_us": "{}\n", "cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("membership", "quotas", "expected"),
    [
        ("0::/\n", {"": (V2, 200000)}, 2),
        ("0::/\n", {"": (V2, "max")}, 8),
        ("0::/pods/this\n", {"pods/this": (V2, 350000), "pods": (V2, 300000), "other": (V2, 100000)}, 3),
        ("0::/pods/this\n", {"pods/this": (V2, 150000)}, 2),
        ("0::/pods/this\n", {"pods/this": (V2, 20000)}, 1),
        ("0::/pods/this\n", {"pods/this": (V2, 1600000)}, 8),
        ("5:cpuset:/\n4:cpu,cpuacct:/docker/ab\n0::/\n", {"cpu": (V1, 200000), "cpu/docker/cd": (V1, 100000)}, 2),
        ("4:cpu,cpuacct:/a\n", {"cpu,cpuacct/a": (V1, 300000), "cpu,cpuacct": (V1, -1)}, 3),
        ("4:cpu:/\n0::/a\n", {"cpu": (V1, -1), "unified/a": (V2, 400000)}, 4),
        ("3:cpuset:/\n", {"cpuset": (V1, 100000)}, 8),
        ("", {}, 8),
    ],
)
def test_cores_are_no_more_than_a_container_has_the_time_of(
    membership: str, quotas: dict[str, tuple[dict[str, str], object]], expected: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(cores.sys, "platform", "linux")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "membership").write_text(membership)
    for group, (files, quota) in quotas.items():
        (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "groups" / group / name).write_text(text.format(quota))
    assert cores.usable_cores(tmp_path / "membership", tmp_path / "groups") == expected
    assert cores.usable_cores(tmp_path / "none", tmp_path / "none") == 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the affinity of a process is of Linux")
def test_only_cores_this_process_may_run_on_are_counted() -> None:
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}]); from alora_serve import cores; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(cores.usable_cores())"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"

"""Pytest plugin: with ``ALORA_TEST_REQUIRE_ALL=1`` a skip is a failure, so that CI cannot pass by lacking a tool.

The one exception are tests marked ``gpu`` on a machine without one: a tool can be installed, a GPU cannot. Without the
variable, pytest's own summary lists the skips at the end of its output, with the reason each test gave.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

VARIABLE = "ALORA_TEST_REQUIRE_ALL"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device, and is skipped without one")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if _lacks_gpu(item):
        pytest.skip("torch sees no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that skipped itself or was marked to be skipped; expected failures stay what they are."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not _lacks_gpu(item):
        _fail_if_required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a module that skipped itself whole, as ``pytest.importorskip`` does."""
    report = yield
    if report.skipped:
        _fail_if_required(report)
    return report


def _lacks_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None and not torch.cuda.is_available()


def _fail_if_required(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get(VARIABLE) == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        report.outcome = "failed"
        report.longrepr = f"{reason}\n{VARIABLE}=1 forbids skipping: install what the test needs"

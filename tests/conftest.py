"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os

from hypothesis import settings

# Before any test imports torch: tests share few cores, and two thread pools as wide as the machine spin on one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run, and no verdict by the clock.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

pytest_plugins = ["demo_model_directory", "require_all", "warm_starts"]

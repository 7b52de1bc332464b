"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os

# Before any test imports torch: tests share few cores, and two thread pools as wide as the machine spin on one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["require_all"]

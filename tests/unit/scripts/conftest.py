"""Loads the repository's scripts, which are files and no package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def load_script(pytestconfig: pytest.Config) -> Callable[[str], ModuleType]:
    """Import ``scripts/NAME.py`` as a fresh module."""

    def load(name: str) -> ModuleType:
        path = Path(pytestconfig.rootpath, "scripts", f"{name}.py")
        spec = importlib.util.spec_from_file_location(f"scripts_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load

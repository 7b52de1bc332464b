"""Finds the pipeline ``examples/rag_guard.py`` in the checkout that this package is run from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

import alora_serve
from alora_serve.errors import ConfigError

_NAME: Final = "rag_guard"


def load_rag_guard() -> ModuleType:
    """The example as a module: ``rag_guard(meter, messages)`` is the pipeline, ``CASE`` its conversation.

    Raises:
        ConfigError: it is not there, as in an installed package.
    """
    file = Path(alora_serve.__file__).resolve().parents[2] / "examples" / f"{_NAME}.py"
    spec = importlib.util.spec_from_file_location(_NAME, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"the pipeline needs {file}: run it in a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

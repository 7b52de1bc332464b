"""YAML as plain values, with one error for all that is none."""

from __future__ import annotations

from typing import Any

import yaml


class _Constructor(yaml.constructor.SafeConstructor):
    """Says where a value is none of its kind: PyYAML lets through whatever its constructors run into there."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As PyYAML does."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


class Loader(_Constructor, yaml.SafeLoader):
    """In Python, for those who change how it reads."""


class FastLoader(_Constructor, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In C, several times as fast, where PyYAML was built with libyaml: routers read large files while they serve."""


def load_yaml(raw: str | bytes, loader: type[Loader | FastLoader] = FastLoader) -> Any:
    """The value that YAML holds.

    Raises:
        yaml.YAMLError: it is no YAML, or a value is none of its kind, such as a 30th of February.
    """
    try:
        return yaml.load(raw, loader)  # a safe one
    except (ArithmeticError, RecursionError, ValueError) as error:  # nested too deep, or a character that is none
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error

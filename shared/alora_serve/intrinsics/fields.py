"""Reads ``io.yaml`` as plain values in a closed world: bounded, no aliases, no duplicate keys, nothing unknown."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any, Final, NoReturn, TypeGuard

import yaml

from alora_serve.errors import AdapterRefusedError
from alora_serve.intrinsics.excerpts import MAX_CHARACTERS, excerpt, sendable
from alora_serve.safe_yaml import Loader, load_yaml

MAX_DEFINITION_BYTES: Final = 1 << 16
"""64 KiB: the published ones have about two."""


_BOOLEAN: Final = "tag:yaml.org,2002:bool"


class _Loader(Loader):
    """Plain values only. An alias could make a small file a huge value, and of two equal keys one would be lost.

    Only ``true`` and ``false`` are booleans, as in YAML 1.2: an unquoted ``yes`` is a category that adapters answer.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # as the base class has it
        first: [(tag, form) for tag, form in resolvers if tag != _BOOLEAN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and sendable(node.value) != node.value:
            raise yaml.MarkedYAMLError(problem="half of a surrogate pair is no text", problem_mark=node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or (type(key), key) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {excerpt(key)} is no key or stands twice", problem_mark=key_node.start_mark
                )
            seen.add((type(key), key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|false)$"), ["t", "f"])


def read_yaml(raw: bytes) -> Any:
    """The value that a YAML file holds.

    Raises:
        AdapterRefusedError: it is too large, or not YAML as it is read here.
    """
    if len(raw) > MAX_DEFINITION_BYTES:
        raise AdapterRefusedError(f"io.yaml has {len(raw)} bytes, more than {MAX_DEFINITION_BYTES}")
    try:
        return load_yaml(raw, _Loader)
    except yaml.YAMLError as error:
        raise AdapterRefusedError(f"io.yaml cannot be read: {error}") from error


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a float holds: a boolean is none, and a file may spell integers beyond all floats."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


class Fields:
    """Typed access to one mapping. A refusal names the field by its path; :meth:`end` refuses what nobody asked for."""

    def __init__(self, value: Any, path: str = "") -> None:
        """Wrap ``value``, which stands at ``path``.

        Raises:
            AdapterRefusedError: it is no mapping with names as keys.
        """
        self._path = path
        self._taken: set[str] = set()
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise AdapterRefusedError(f"io.yaml: {path or 'the file'} is not a mapping of names but {excerpt(value)}")
        self._values: Mapping[str, Any] = value

    def refuse(self, field: str, why: str) -> NoReturn:
        """Refuse the file for a field.

        Raises:
            AdapterRefusedError: always.
        """
        raise AdapterRefusedError(f"io.yaml has {self.path(field)} = {excerpt(self._values.get(field))}: {why}")

    def path(self, field: str) -> str:
        """Where a field stands, for people."""
        return f"{self._path}.{field}" if self._path else field

    def require(self, *fields: str) -> None:
        """Return if all are there, if only as null."""
        missing = [self.path(field) for field in fields if field not in self._values]
        if missing:
            raise AdapterRefusedError(f"io.yaml lacks {', '.join(missing)}")

    def end(self) -> None:
        """Return if every field was asked for."""
        unknown = sorted(self._values.keys() - self._taken)
        if unknown:
            known = ", ".join(sorted(self._taken))
            raise AdapterRefusedError(
                f"io.yaml has {self.path(unknown[0][:MAX_CHARACTERS])}, which is not known here; known are {known}"
            )

    def take(self, field: str) -> Any:
        """Its value as it is; None where it is absent or null."""
        self._taken.add(field)
        return self._values.get(field)

    def text(self, field: str) -> str | None:
        """A string, if given."""
        value = self.take(field)
        if value is not None and not isinstance(value, str):
            self.refuse(field, "it must be text")
        return value

    def name(self, field: str) -> str:
        """A string that must be there."""
        value = self.text(field)
        if not value:
            self.refuse(field, "it must be text and not empty")
        return value

    def names(self, field: str) -> tuple[str, ...]:
        """A list of strings that must be there."""
        value = self.take(field)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(field, "it must be a list of texts")
        return tuple(value)

    def mapping(self, field: str) -> Mapping[Any, Any]:
        """A mapping that must be there and hold something."""
        value = self.take(field)
        if not isinstance(value, dict) or not value:
            self.refuse(field, "it must be a mapping and not empty")
        return value

    def number(self, field: str) -> float | None:
        """A finite number, if given."""
        value = self.take(field)
        if value is None:
            return None
        if not is_number(value):
            self.refuse(field, "it must be a number")
        return float(value)

    def integer(self, field: str, minimum: int, *, bits: int = 32) -> int | None:
        """An integer of at least ``minimum`` that an unsigned field of so many bits holds, if given."""
        value = self.take(field)
        if value is None:
            return None
        if type(value) is not int or not minimum <= value < 1 << bits:
            self.refuse(field, f"it must be an integer from {minimum} to 2^{bits} - 1")
        return value

    def one_of(self, field: str, allowed: Collection[str]) -> str | None:
        """One of a few texts, if given."""
        value = self.text(field)
        if value is not None and value not in allowed:
            self.refuse(field, f"it must be one of {', '.join(allowed)}")
        return value

    def inner(self, field: str) -> Fields | None:
        """A mapping of its own, if given."""
        value = self.take(field)
        return None if value is None else Fields(value, self.path(field))

    def items(self, field: str) -> Iterator[Fields]:
        """The mappings of a list; nothing where it is absent or null."""
        value = self.take(field)
        if value is not None and not isinstance(value, list):
            self.refuse(field, "it must be a list")
        for index, item in enumerate(value or ()):
            yield Fields(item, f"{self.path(field)}[{index}]")

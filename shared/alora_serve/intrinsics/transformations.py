"""What an ``io.yaml`` can do to a parsed answer, but for ``likelihood``; docs/intrinsics.md tells each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from alora_serve.errors import IntrinsicOutputError
from alora_serve.intrinsics.answer import Answer
from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.intrinsics.json_paths import Json, Path, Pattern, as_records, pointer, replaced, value_at


class Transformation(Protocol):
    """One step from the parsed answer to the result. Immutable.

    Attributes:
        yaml_name: its ``type`` in the file.
        input_path: which places it is applied to, all found before the first is changed.
    """

    yaml_name: ClassVar[str]

    @property
    def input_path(self) -> Pattern:
        """See the class."""
        ...

    def apply(self, document: Json, path: Path, answer: Answer) -> Json:
        """A copy of ``document``, transformed at ``path``.

        Raises:
            IntrinsicOutputError: what stands there is not of the kind that it takes.
        """
        ...


@dataclass(frozen=True, slots=True)
class DecodeSentences:
    """Adds, beside a sentence's number, what is known of that sentence.

    Attributes:
        source: where sentences were tagged.
        names: name of each field to add, by what it holds: ``begin``, ``end``, ``text``, ``document_id``,
            ``message_index``.
    """

    yaml_name: ClassVar[str] = "decode_sentences"

    input_path: Pattern
    source: tuple[str, ...]
    names: Mapping[str, str]

    def apply(self, document: Json, path: Path, answer: Answer) -> Json:
        """The record around ``path`` with new fields."""
        number, record = value_at(document, path), value_at(document, path[:-1]) if path else None
        if not isinstance(record, dict):
            raise IntrinsicOutputError(f"decode_sentences needs a field of a record, not {excerpt(pointer(path))}")
        known = {
            number: tagged for source in self.source for number, tagged in answer.sentences.get(source, {}).items()
        }
        if type(number) is not int or number not in known:
            raise IntrinsicOutputError(
                f"the answer cites sentence {excerpt(number)} at {excerpt(pointer(path))}; {len(known)} were tagged"
            )
        added = {name: getattr(known[number], fact) for fact, name in self.names.items()}
        return replaced(document, path[:-1], lambda record: record | added)


@dataclass(frozen=True, slots=True)
class Explode:
    """One record for each element of a list-valued field, in a list of records."""

    yaml_name: ClassVar[str] = "explode"

    input_path: Pattern
    target_field: str

    def apply(self, document: Json, path: Path, answer: Answer) -> Json:
        """The list at ``path``, longer or shorter."""
        exploded = []
        for record in as_records(value_at(document, path), path, self.yaml_name, [self.target_field]):
            elements = record[self.target_field]
            if not isinstance(elements, list):
                raise IntrinsicOutputError(f"explode needs a list in {self.target_field!r} of {excerpt(record)}")
            exploded += [{**record, self.target_field: element} for element in elements]
        return _put(document, path, exploded)


@dataclass(frozen=True, slots=True)
class DropDuplicates:
    """Of records that agree in some fields only the last, in the place of the first."""

    yaml_name: ClassVar[str] = "drop_duplicates"

    input_path: Pattern
    target_fields: tuple[str, ...]

    def apply(self, document: Json, path: Path, answer: Answer) -> Json:
        """The list at ``path``, shorter."""
        records = as_records(value_at(document, path), path, self.yaml_name, self.target_fields)
        kept = {tuple(_key(record[field]) for field in self.target_fields): record for record in records}
        return _put(document, path, list(kept.values()))


@dataclass(frozen=True, slots=True)
class Project:
    """Only some fields of a record, or of each record of a list, under their new names; null where it has none."""

    yaml_name: ClassVar[str] = "project"

    input_path: Pattern
    retained_fields: Mapping[str, str]

    def apply(self, document: Json, path: Path, answer: Answer) -> Json:
        """The records at ``path`` with fewer fields."""
        value = value_at(document, path)
        if isinstance(value, dict):
            return _put(document, path, self._projected(value))
        return _put(document, path, [self._projected(record) for record in as_records(value, path, self.yaml_name)])

    def _projected(self, record: Mapping[str, Json]) -> dict[str, Json]:
        return {new: record.get(old) for old, new in self.retained_fields.items()}


@dataclass(frozen=True, slots=True)
class Nest:
    """A record with the value as its only field."""

    yaml_name: ClassVar[str] = "nest"

    input_path: Pattern
    field_name: str

    def apply(self, document: Json, path: Path, answer: Answer) -> Json:
        """A record at ``path``."""
        return replaced(document, path, lambda value: {self.field_name: value})


@dataclass(frozen=True, slots=True)
class MergeSpans:
    """One record for spans of a group that touch, in a list of records sorted by group and beginning."""

    yaml_name: ClassVar[str] = "merge_spans"

    input_path: Pattern
    group_fields: tuple[str, ...]
    begin_field: str
    end_field: str
    text_field: str | None = None

    def apply(self, document: Json, path: Path, answer: Answer) -> Json:
        """The list at ``path``, sorted and shorter."""
        texts = () if self.text_field is None else (self.text_field,)
        needed = (self.begin_field, self.end_field, *texts)
        records = as_records(value_at(document, path), path, self.yaml_name, needed)
        for record in records:
            foreign = record.keys() - {*self.group_fields, *needed}
            if foreign or any(record[field] is None for field in needed):
                raise IntrinsicOutputError(
                    f"merge_spans needs {', '.join(needed)} and otherwise only group_fields in each record; project "
                    f"to those fields first: {excerpt(record)}"
                )
        try:
            ordered = sorted(records, key=lambda record: (*self._group(record), record[self.begin_field]))
            return _put(document, path, self._merged(ordered))
        except TypeError as error:
            raise IntrinsicOutputError(
                f"merge_spans cannot order or join these records ({error}): {excerpt(records)}"
            ) from error

    def _merged(self, ordered: list[dict[str, Json]]) -> list[dict[str, Json]]:
        merged: list[dict[str, Json]] = []
        previous_begin: Json = None
        for record in ordered:
            last = merged[-1] if merged and self._group(merged[-1]) == self._group(record) else None
            if last is not None and previous_begin == record[self.begin_field]:
                raise IntrinsicOutputError(
                    f"merge_spans found two spans that begin alike: {excerpt(record)}; drop_duplicates"
                )
            if last is not None and last[self.end_field] == record[self.begin_field]:
                last[self.end_field] = record[self.end_field]
                if self.text_field is not None:
                    last[self.text_field] += record[self.text_field]
            else:
                merged.append(dict(record))
            previous_begin = record[self.begin_field]
        return merged

    def _group(self, record: Mapping[str, Json]) -> tuple[Json, ...]:
        return tuple(record.get(field) for field in self.group_fields)


def _put(document: Json, path: Path, value: Json) -> Json:
    unchanged: Callable[[Json], Json] = lambda _: value  # noqa: E731
    return replaced(document, path, unchanged)


def _key(value: Json) -> Json:
    """Something hashable that is equal for equal values."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value

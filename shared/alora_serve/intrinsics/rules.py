"""Reads one entry of an ``io.yaml``'s ``transformations``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Final

from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.intrinsics.fields import Fields, is_number
from alora_serve.intrinsics.json_paths import Pattern
from alora_serve.intrinsics.likelihood import Likelihood
from alora_serve.intrinsics.transformations import (
    DecodeSentences,
    DropDuplicates,
    Explode,
    MergeSpans,
    Nest,
    Project,
    Transformation,
)

_FACTS: Final = {"documents": "document_id", "all_but_last_message": "message_index"}
"""What is known of sentences of one source only."""


def read_transformation(fields: Fields) -> Transformation:
    """One transformation.

    Raises:
        AdapterRefusedError: unknown, or an argument is unknown, missing or of the wrong kind.
    """
    fields.require("type", "input_path")
    reader = _READERS.get(str(fields.take("type")))
    if reader is None:
        fields.refuse("type", f"no such transformation; there are {', '.join(_READERS)}")
    transformation = reader(fields, _pattern(fields))
    fields.end()
    return transformation


def _pattern(fields: Fields) -> Pattern:
    steps = fields.take("input_path")
    if not isinstance(steps, list) or not all(step is None or type(step) in (str, int) for step in steps):
        fields.refuse("input_path", "it must be a list of names, positions and null, which stands for any")
    return tuple(steps)


def _likelihood(fields: Fields, pattern: Pattern) -> Likelihood:
    categories: dict[str, float] = {}
    for category, value in fields.mapping("categories_to_values").items():
        if type(category) not in (str, int, float, bool) or not is_number(value):
            fields.refuse("categories_to_values", "it must map texts, numbers or booleans to numbers")
        spelling = category if isinstance(category, str) else json.dumps(category)
        if not spelling or spelling in categories:
            fields.refuse("categories_to_values", f"the category {excerpt(spelling)} is empty or stands twice")
        categories[spelling] = float(value)
    return Likelihood(pattern, categories)


def _decode_sentences(fields: Fields, pattern: Pattern) -> DecodeSentences:
    given = fields.take("source")
    source = (given,) if isinstance(given, str) else fields.names("source")
    allowed = {"last_message", *_FACTS}
    if not source or not allowed.issuperset(source):
        fields.refuse("source", f"it must be one or more of {', '.join(sorted(allowed))}")
    if "last_message" in source and len(set(source)) > 1:
        fields.refuse("source", "sentences of last_message have numbers of their own")
    facts = {"begin", "end", "text", *(_FACTS[location] for location in source if location in _FACTS)}
    names = fields.mapping("output_names")
    if not facts.issuperset(names) or not all(isinstance(name, str) and name for name in names.values()):
        fields.refuse("output_names", f"it must name fields for some of {', '.join(sorted(facts))}")
    return DecodeSentences(pattern, source, names)


def _project(fields: Fields, pattern: Pattern) -> Project:
    if isinstance(fields.take("retained_fields"), list):
        return Project(pattern, {name: name for name in fields.names("retained_fields")})
    retained = fields.mapping("retained_fields")
    if not all(isinstance(name, str) for item in retained.items() for name in item):
        fields.refuse("retained_fields", "it must be a list of names, or map old names to new ones")
    return Project(pattern, retained)


def _merge_spans(fields: Fields, pattern: Pattern) -> MergeSpans:
    return MergeSpans(
        pattern,
        fields.names("group_fields"),
        fields.name("begin_field"),
        fields.name("end_field"),
        fields.text("text_field"),
    )


_READERS: Final[Mapping[str, Callable[[Fields, Pattern], Transformation]]] = {
    "decode_sentences": _decode_sentences,
    "drop_duplicates": lambda fields, pattern: DropDuplicates(pattern, fields.names("target_fields")),
    "explode": lambda fields, pattern: Explode(pattern, fields.name("target_field")),
    "likelihood": _likelihood,
    "merge_spans": _merge_spans,
    "nest": lambda fields, pattern: Nest(pattern, fields.name("field_name")),
    "project": _project,
}

"""An intrinsic as its ``io.yaml`` defines it: what to ask an adapter, and what to make of the answer.

The format is that of the Granite intrinsic libraries, which mellea reads too. Nothing in a file is ignored: what this
release does not know is refused by name when the file is read.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from alora_serve.errors import AdapterRefusedError
from alora_serve.intrinsics.fields import Fields, read_yaml
from alora_serve.intrinsics.likelihood import Likelihood
from alora_serve.intrinsics.parameters import read_parameters
from alora_serve.intrinsics.rules import read_transformation
from alora_serve.intrinsics.transformations import DecodeSentences, Transformation
from alora_serve.types import SamplingParams

FILE_NAME: Final = "io.yaml"

LOCATIONS: Final = ("last_message", "documents", "all_but_last_message")
"""Where sentences can be tagged."""

DOCUMENT_FORMS: Final = ("string", "json", "roles")

LAST_MESSAGE: Final = "last_message"
"""What an instruction calls the text of the conversation's last turn."""


@dataclass(frozen=True, slots=True)
class IntrinsicDefinition:
    """One ``io.yaml``.

    Attributes:
        transformations: in the order of their application.
        json_schema: of the answer, as text; empty when it is not bound to one.
        instruction: asked as a turn of the user after the conversation, with ``{names}`` to fill in; None adds no turn.
        arguments: those names.
        sampling: how to choose the answer's tokens; the form of the answer not included.
        template_arguments: for the chat template.
        sentence_boundaries: by location, the letter of its tags.
        docs_as_message: how documents become turns before the conversation; empty leaves them to the chat template.
        name: for people.
    """

    transformations: tuple[Transformation, ...] = ()
    json_schema: str = ""
    instruction: str | None = None
    arguments: frozenset[str] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    sentence_boundaries: Mapping[str, str] = field(default_factory=dict)
    docs_as_message: str = ""
    name: str = ""

    @property
    def parameters(self) -> frozenset[str]:
        """Names that a caller fills in."""
        return self.arguments - {LAST_MESSAGE}

    @property
    def needs_logprobs(self) -> bool:
        """Whether a transformation weighs tokens."""
        return any(isinstance(step, Likelihood) for step in self.transformations)

    @property
    def needs_last_message(self) -> bool:
        """Whether the conversation's last turn must be known as text."""
        return LAST_MESSAGE in self.arguments or bool(self.sentence_boundaries.keys() - {"documents"})


def parse_definition(raw: bytes) -> IntrinsicDefinition:
    """Read the bytes of an ``io.yaml``.

    Raises:
        AdapterRefusedError: it is too large, no YAML, lacks a field, has an unknown one or a value of the wrong kind,
            or contradicts itself. Names the field.
    """
    fields = Fields(read_yaml(raw))
    fields.require("model", "response_format", "transformations")
    fields.text("model")  # says which model to ask, where one server has several: here it is the adapter's
    if fields.take("logprobs_workaround"):
        fields.refuse("logprobs_workaround", "answers in several channels are not served")
    instruction = fields.text("instruction")
    parameters = fields.inner("parameters")
    schema = _json_schema(fields) or _schema_of_parameters(parameters)
    sampling, template_arguments = read_parameters(parameters)
    boundaries = _boundaries(fields)
    definition = IntrinsicDefinition(
        transformations=tuple(map(read_transformation, fields.items("transformations"))),
        json_schema=schema,
        instruction=instruction,
        arguments=frozenset(_arguments(instruction or "")),
        sampling=sampling,
        template_arguments=template_arguments,
        sentence_boundaries=boundaries,
        docs_as_message=fields.one_of("docs_as_message", DOCUMENT_FORMS) or "",
        name=fields.text("name") or "",
    )
    fields.end()
    for index, step in enumerate(definition.transformations):
        untagged = sorted(set(step.source) - boundaries.keys()) if isinstance(step, DecodeSentences) else []
        if untagged:
            raise AdapterRefusedError(
                f"io.yaml has transformations[{index}].source = {untagged[0]}, where sentence_boundaries tags nothing"
            )
    return definition


def _json_schema(fields: Fields, field: str = "response_format") -> str:
    schema = fields.take(field)
    if isinstance(schema, str) and schema.strip():
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            fields.refuse(field, f"it is not JSON ({error})")
    if not schema:
        return ""
    if not isinstance(schema, dict):
        fields.refuse(field, "it must be a JSON schema, as JSON text or as YAML")
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        fields.refuse(field, f"it is not JSON ({error})")


def _schema_of_parameters(parameters: Fields | None) -> str:
    """The schema as files for Ollama have it: ``parameters.response_format``, as in a chat completion."""
    given = parameters.inner("response_format") if parameters else None
    if given is None:
        return ""
    given.one_of("type", ("json_schema",))
    form = given.inner("json_schema")
    given.end()
    if form is None:
        given.refuse("json_schema", "it must hold the schema")
    form.text("name")
    form.take("strict")  # an answer is always held to it
    schema = _json_schema(form, "schema")
    form.end()
    return schema


def _boundaries(fields: Fields) -> dict[str, str]:
    if fields.take("sentence_boundaries") is False:  # as mellea takes it: none
        return {}
    given = fields.inner("sentence_boundaries")
    if given is None:
        return {}
    tags = {location: tag for location in LOCATIONS if (tag := given.text(location))}
    given.end()
    return tags


def _arguments(instruction: str) -> Iterator[str]:
    """Names in braces. Attributes, items and conversions would reach into Python."""
    try:
        for _, name, form, conversion in string.Formatter().parse(instruction):
            if name is None:
                continue
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"{{{name[:40]}}} is not a plain name; write {{{{ and }}}} for braces")
            yield name
    except ValueError as error:
        raise AdapterRefusedError(f"io.yaml has an instruction that cannot be filled in: {error}") from error

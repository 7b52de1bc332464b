"""The conversation as an intrinsic's adapter sees it: sentences tagged, documents placed, the instruction filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from alora_serve.errors import FieldViolation, InvalidRequestError
from alora_serve.intrinsics.definition import LAST_MESSAGE, IntrinsicDefinition
from alora_serve.intrinsics.documents import document_names, with_documents_placed
from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.intrinsics.sentences import TaggedSentence, Tagger
from alora_serve.types import ChatMessage, Prompt


@dataclass(frozen=True, slots=True)
class Question:
    """What an intrinsic asks about a conversation.

    Attributes:
        conversation: what comes before the instruction: the same for intrinsics that rewrite alike, so that they share
            its KV.
        instruction: the turn that follows; None when there is none.
        template_arguments: for the chat template.
        sentences: by location, by number, those that were tagged.
    """

    conversation: Prompt
    instruction: ChatMessage | None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    sentences: Mapping[str, Mapping[int, TaggedSentence]] = field(default_factory=dict)

    @property
    def prompt(self) -> Prompt:
        """The whole."""
        if self.instruction is None:
            return self.conversation
        messages = (*self.conversation.messages, self.instruction)
        return replace(self.conversation, messages=messages, template_arguments=self.template_arguments)


def ask(
    definition: IntrinsicDefinition, prompt: Prompt, parameters: Mapping[str, Any], *, template_takes_documents: bool
) -> Question:
    """Apply a definition to a conversation. Changes nothing that it is given.

    Args:
        definition: of the intrinsic.
        prompt: the conversation.
        parameters: values for the instruction's names; others are not looked at.
        template_takes_documents: documents may be left to the chat template; see :func:`with_documents_placed`.

    Raises:
        InvalidRequestError: a parameter is missing or no plain value, or the definition needs to see turns that lie
            in a handle or in token ids.
    """
    _check_visible(definition, prompt)
    rewritten, sentences = _tagged(definition.sentence_boundaries, prompt)
    rewritten = with_documents_placed(
        rewritten, form=definition.docs_as_message, template_takes_documents=template_takes_documents
    )
    instruction = None
    if definition.instruction is not None:
        last = rewritten.messages[-1].content if rewritten.messages else ""
        filled = definition.instruction.format(**_values(definition, parameters), **{LAST_MESSAGE: last})
        instruction = ChatMessage("user", filled)
    arguments = {**definition.template_arguments, **rewritten.template_arguments}
    # A handle alone is rendered already.
    conversation = replace(rewritten, template_arguments=arguments) if rewritten.messages else rewritten
    return Question(conversation, instruction, arguments, sentences)


def _check_visible(definition: IntrinsicDefinition, prompt: Prompt) -> None:
    for whole in ("token_ids", "text"):
        if getattr(prompt, whole):
            raise InvalidRequestError.of(f"prompt.{whole}", "an intrinsic is asked about messages or a handle of them")
    if prompt.handle is None:
        if not prompt.messages:
            raise InvalidRequestError.of("prompt.messages", "is empty; send at least one message")
        return
    if definition.needs_last_message and not prompt.messages:
        raise InvalidRequestError.of(
            "prompt.handle", "this intrinsic reads the last message: send all messages instead"
        )
    if "all_but_last_message" in definition.sentence_boundaries:
        raise InvalidRequestError.of(
            "prompt.handle", "this intrinsic tags all messages: send them instead of the handle"
        )
    if "documents" in definition.sentence_boundaries:
        raise InvalidRequestError.of(
            "prompt.handle", "this intrinsic tags documents: send all messages with them instead of the handle"
        )
    if prompt.documents:
        raise InvalidRequestError.of(
            "prompt.documents", "stand before the conversation: send all messages with them instead of the handle"
        )


def _values(definition: IntrinsicDefinition, parameters: Mapping[str, Any]) -> dict[str, str]:
    values: dict[str, str] = {}
    violations: list[FieldViolation] = []
    for name in sorted(definition.parameters):
        value = parameters.get(name)
        if type(value) not in (str, int, float, bool):
            known = "is missing" if value is None else f"is {excerpt(value)}, neither text nor number nor boolean"
            violations.append(FieldViolation(f"parameters.{name}", f"{known}; the instruction names it"))
        values[name] = str(value)
    if violations:
        raise InvalidRequestError("; ".join(f"{v.field} {v.description}" for v in violations), violations=violations)
    return values


def _tagged(boundaries: Mapping[str, str], prompt: Prompt) -> tuple[Prompt, Mapping[str, Mapping[int, TaggedSentence]]]:
    """The prompt with tags. The last message's have numbers of their own; documents and history share one sequence."""
    if not boundaries:
        return prompt, {}
    messages, documents = list(prompt.messages), list(prompt.documents)
    sentences: dict[str, dict[int, TaggedSentence]] = {location: {} for location in boundaries}
    tag = boundaries.get("last_message")
    if tag:
        tagger = Tagger(sentences["last_message"])
        messages[-1] = replace(messages[-1], content=tagger.tag(messages[-1].content, tag))
    number = 0
    tag = boundaries.get("documents")
    if tag:
        tagger = Tagger(sentences["documents"])
        documents = [
            replace(document, text=tagger.tag(document.text, tag, document_id=name))
            for document, name in zip(documents, document_names(documents), strict=True)
        ]
        number = tagger.next_number
    tag = boundaries.get("all_but_last_message")
    if tag:
        tagger = Tagger(sentences["all_but_last_message"], number)
        messages[:-1] = [
            replace(message, content=tagger.tag(message.content, tag, message_index=index))
            for index, message in enumerate(messages[:-1])
        ]
    return replace(prompt, messages=tuple(messages), documents=tuple(documents)), sentences

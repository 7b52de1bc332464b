"""Documents as turns of a conversation, where its chat template has no place for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from alora_serve.types import DOCUMENT_ROLE, ChatMessage, Document, Prompt

DOCUMENTS_HEAD: Final = "You have access to the following documents:\n\n"


def with_documents_placed(prompt: Prompt, *, form: str = "", template_takes_documents: bool) -> Prompt:
    """The prompt with its documents where the model sees them.

    Args:
        prompt: its messages begin the conversation.
        form: ``string``, ``json`` or ``roles``, in front of everything, as a definition asks for it; empty leaves them
            to a template that takes them. For one that does not, they become one turn of the user, after the turns of
            the system that the conversation begins with: base model and adapters must see the same, to share its KV.
        template_takes_documents: the chat template has a place for them.
    """
    if not prompt.documents or (not form and template_takes_documents):
        return prompt
    turns = _document_turns(prompt.documents, form or "string")
    end_of_system = next((i for i, turn in enumerate(prompt.messages) if turn.role != "system"), len(prompt.messages))
    at = 0 if form else end_of_system
    messages = (*prompt.messages[:at], *turns, *prompt.messages[at:])
    return replace(prompt, messages=messages, documents=())


def document_names(documents: Sequence[Document]) -> list[str]:
    """What the documents are called: a document without an id by its position."""
    return [document.doc_id or str(number) for number, document in enumerate(documents, start=1)]


def _document_turns(documents: Sequence[Document], form: str) -> list[ChatMessage]:
    names = document_names(documents)
    match form:
        case "roles":
            return [
                ChatMessage(DOCUMENT_ROLE + name, document.text)
                for name, document in zip(names, documents, strict=True)
            ]
        case "json":
            facts = ({"text": d.text, "title": d.title, "doc_id": d.doc_id} for d in documents)
            records = [{name: value for name, value in fact.items() if value or name == "text"} for fact in facts]
            return [ChatMessage("user", json.dumps(records))]
        case _:
            texts = [f"[Document {name}]\n{document.text}" for name, document in zip(names, documents, strict=True)]
            return [ChatMessage("user", DOCUMENTS_HEAD + "\n\n".join(texts))]

"""What a request asks about: a conversation as messages, as tokens, as text, or as a handle that the server signed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from alora_serve.types.ids import TokenIds

ROLES: Final = ("system", "user", "assistant", "tool")
DOCUMENT_ROLE: Final = "document "
"""Begins the role of a turn that is a document: its name follows. Only for templates that know such turns."""


def is_role(role: str) -> bool:
    """Whether a turn may have that role."""
    return role in ROLES or (role.startswith(DOCUMENT_ROLE) and len(role) > len(DOCUMENT_ROLE))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by the assistant. ``arguments_json`` is a JSON object as text."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. ``role`` is one of ``system``, ``user``, ``assistant``, ``tool``; or ``document NAME``."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A document the conversation is about; reaches the chat template as ``documents``."""

    title: str
    text: str
    doc_id: str = ""


class PromptKind(enum.Enum):
    """How a handle's tokens came to be, which decides where a worker may put an invocation."""

    CONVERSATION = "conversation"
    """Rendered from messages: closed turns, then a generation prompt apart."""
    TOKENS = "tokens"
    """Raw token ids, taken exactly as given, or those of raw text; no generation prompt."""


@dataclass(frozen=True, slots=True)
class PrefixHandle:
    """A conversation as tokens, signed by the server. Holds no KV and names no blocks.

    Attributes:
        model_digest: 32 bytes: weights, forward config, tokenizer and chat template.
        storage_digest: 32 bytes: the rest of the key root (dtype, layout, block size, salt). A different one is a miss.
        prefix_tokens: everything before the generation prompt.
        generation_prompt_tokens: what the template puts before an assistant's answer; empty for ``TOKENS``.
        kind: see :class:`PromptKind`.
        last_role: role of the last turn in ``prefix_tokens``; empty for ``TOKENS``.
        open_turn: the tokens end inside an assistant's turn that the template has not closed yet (after a base turn).
        expires_unix_seconds: not accepted after this time plus the allowed clock skew.
        mac: 32 bytes HMAC-SHA256 over everything above and the tenant salt.
    """

    model_digest: bytes
    storage_digest: bytes
    prefix_tokens: TokenIds
    generation_prompt_tokens: TokenIds
    kind: PromptKind
    last_role: str
    open_turn: bool
    expires_unix_seconds: int
    mac: bytes = b""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue: messages, raw tokens, raw text, a handle, or a handle and the messages that are new since.

    Exactly one of: ``messages`` (with or without ``handle``), ``token_ids``, ``text``, or ``handle`` alone.

    Attributes:
        template_arguments: extra variables for the chat template (``date_string``, ``enable_thinking``).
        tools: JSON-schema tool descriptions for the template.
        text: a complete prompt without the template; text of special tokens in it stands for them.
    """

    messages: tuple[ChatMessage, ...] = ()
    token_ids: TokenIds = ()
    handle: PrefixHandle | None = None
    documents: tuple[Document, ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str = ""

"""A conversation as turns, and the shortest prompt that continues it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alora_serve.types import ChatMessage, Document, PrefixHandle, Prompt


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said so far.

    Attributes:
        messages: all turns, the system's first if there is one.
        handles: the server's names for beginnings of it: how many turns each covers, ascending, and the handle.
        documents: what it is about, for chat templates that take documents.
        tools: as in :class:`~alora_serve.types.Prompt`.
        template_arguments: the same.
    """

    messages: tuple[ChatMessage, ...] = ()
    handles: tuple[tuple[int, PrefixHandle], ...] = ()
    documents: tuple[Document, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Prompt) -> Conversation:
        """The conversation of a prompt that is messages."""
        return cls(
            messages=prompt.messages,
            documents=prompt.documents,
            tools=prompt.tools,
            template_arguments=prompt.template_arguments,
        )

    @property
    def is_empty(self) -> bool:
        """Nobody but the system has said anything."""
        return all(message.role == "system" for message in self.messages)

    @property
    def awaits_answer(self) -> bool:
        """The last turn is no assistant's."""
        return not self.is_empty and self.messages[-1].role != "assistant"

    @property
    def system(self) -> str | None:
        """What the system says at the beginning, if anything."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    def prompt(self) -> Prompt:
        """The last handle and what is new since; without one, everything. Documents and tools lie in a handle."""
        if self.handles:
            covered, handle = self.handles[-1]
            new = self.messages[covered:]
            return Prompt(messages=new, handle=handle, template_arguments=self.template_arguments if new else {})
        return Prompt(
            messages=self.messages,
            documents=self.documents,
            tools=self.tools,
            template_arguments=self.template_arguments,
        )

    def whole(self) -> Prompt:
        """All of it as messages."""
        return self.without_handles().prompt()

    def said(self, role: str, content: str, handle: PrefixHandle | None = None) -> Conversation:
        """With one turn more, and the handle that covers all turns, where there is one."""
        messages = (*self.messages, ChatMessage(role, content))
        handles = self.handles if handle is None else (*self.handles, (len(messages), handle))
        return replace(self, messages=messages, handles=handles)

    def told(self, system: str | None) -> Conversation:
        """With this for the system's turn; None: with none. No handle survives, as none begins so."""
        rest = self.messages if self.system is None else self.messages[1:]
        head = () if system is None else (ChatMessage("system", system),)
        return replace(self, messages=(*head, *rest), handles=())

    def undone(self) -> Conversation:
        """Without the user's last turn and all that followed; the same if the user has said nothing."""
        at = self._last_user_turn()
        return self if at is None else self._first(at)

    def unanswered(self) -> Conversation:
        """Without all that followed the user's last turn; the same if the user has said nothing."""
        at = self._last_user_turn()
        return self if at is None else self._first(at + 1)

    def without_handles(self) -> Conversation:
        """As messages alone, for when the server knows its handles no more."""
        return replace(self, handles=())

    def _last_user_turn(self) -> int | None:
        turns: Sequence[int] = [at for at, message in enumerate(self.messages) if message.role == "user"]
        return turns[-1] if turns else None

    def _first(self, count: int) -> Conversation:
        kept = tuple((covered, handle) for covered, handle in self.handles if covered <= count)
        return replace(self, messages=self.messages[:count], handles=kept)

"""A renderer for tests of what benchmarks ask: a token is a word."""

from __future__ import annotations

from collections.abc import Sequence

from alora_serve.types import ChatMessage, TokenIds


class WordRenderer:
    """Counts words, and keeps a conversation readable: a token is a word's number in ``words``."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def prefix(self, messages: Sequence[ChatMessage]) -> TokenIds:
        text = " ".join(f"<{message.role}> {message.content}" for message in messages)
        return tuple(self._number(word) for word in text.split())

    def base_prompt(self, messages: Sequence[ChatMessage]) -> TokenIds:
        return (*self.prefix(messages), self._number("<answer>"))

    def of_length(self, tokens: int, *, seed: int) -> TokenIds:
        return (seed,) * tokens

    def _number(self, word: str) -> int:
        return self.words.setdefault(word, len(self.words))

"""Sentences as adapters cite them: text split and tagged ``<c0> First. <c1> Second.``, and tags looked up again.

The splitter is NLTK's Punkt without trained parameters, which is what those adapters were trained on: a better one
would number other sentences (docs/adr/0027-intrinsics.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TaggedSentence:
    """A sentence of a document or message.

    Attributes:
        text: with the space before the next tag, so that texts of neighbours join.
        begin: characters before it in its document or message, tags not counted.
        end: the same, after it.
        document_id: of a document, or its position where it has none.
        message_index: of a message before the last.
    """

    text: str
    begin: int
    end: int
    document_id: str | None = None
    message_index: int | None = None


class Splitter(Protocol):
    """Splits text into sentences without losing any but the white space between them. Thread-safe."""

    def tokenize(self, text: str) -> list[str]:
        """The sentences, in order; none of a text of white space."""
        ...


@cache
def splitter() -> Splitter:
    """The splitter. Imported late: most intrinsics cite nothing."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    punkt: Splitter = PunktSentenceTokenizer()
    return punkt


@dataclass(slots=True)
class Tagger:
    """Tags text after text with one letter and running numbers.

    Attributes:
        found: every sentence so far, by number.
    """

    found: dict[int, TaggedSentence]
    next_number: int = 0

    def tag(self, text: str, prefix: str, *, document_id: str | None = None, message_index: int | None = None) -> str:
        """The text with ``<prefix number> `` before each sentence, one space between them."""
        tagged, begin = [], 0
        for sentence, is_last in _with_last(splitter().tokenize(text)):
            tagged.append(f"<{prefix}{self.next_number}> {sentence}")
            spaced = sentence if is_last else f"{sentence} "
            end = begin + len(spaced)
            self.found[self.next_number] = TaggedSentence(spaced, begin, end, document_id, message_index)
            begin = end
            self.next_number += 1
        return " ".join(tagged)


def _with_last(sentences: list[str]) -> Iterator[tuple[str, bool]]:
    for index, sentence in enumerate(sentences, start=1):
        yield sentence, index == len(sentences)

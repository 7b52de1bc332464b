"""Generated tokens as text, piece by piece: whole characters only, and nothing at or after a stop string.

The text of an answer is a pure function of its tokens, taken one at a time in order, and of the stop strings. It does
not depend on how the tokens were grouped on their way here, so a stream that another worker takes over goes on exactly
where the first one stood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from alora_serve.errors import InvalidRequestError

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out, an incomplete character shown as U+FFFD."""

_INCOMPLETE = "\ufffd"
_MAX_HELD_TOKENS = 8
"""A UTF-8 character has at most four bytes, so a text that has not come to an end after twice as many tokens is not
incomplete but broken, and goes out as it is."""
_RESYNCHRONISE_TOKENS = 4
"""After a cut anywhere in a byte sequence, UTF-8 finds its character borders again within three bytes."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens added. ``stop_string`` is the stop string that ended the text, if one did."""

    text: str
    stop_string: str | None = None


class TextGate(Protocol):
    """Says where a text may end. Not thread-safe; its answers are a function of the text."""

    def advance(self, text: str) -> None:
        """The text goes on with this."""

    def may_end(self, text: str) -> bool:
        """Whether it could end after this, told nothing of it yet. Changes nothing."""


class TextStream:
    """Text of one growing answer. Each token costs constant time; not thread-safe.

    A stop string ends the text at the first token after which one occurs. When that token completes several, the one
    that begins earliest counts, the longest of those that begin together; the text ends before it. Where a gate does
    not let the text end, a stop string is text like any other.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), gate: TextGate | None = None) -> None:
        """``stop`` holds no empty strings (:class:`~alora_serve.errors.InvalidRequestError`)."""
        if not all(stop):
            raise InvalidRequestError.of("sampling.stop", "a stop string is empty")
        self._decode = decode
        self._gate = gate if stop else None
        self._stop = tuple(sorted(set(stop), key=len, reverse=True))
        self._longest_stop = max(map(len, self._stop), default=0)
        # The window: tokens [0, read) are already in the text and stand here only as context, because what a token
        # adds depends on its neighbours (leading spaces, characters of several tokens); [read, ...) are held.
        self._window: list[int] = []
        self._read = 0
        self._read_text = ""
        self._window_text = ""
        self._pending = ""
        self._ended = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add tokens and return the text that is now certain.

        Tokens after one that completes a stop string are ignored, in this call and in later ones.
        """
        text = ""
        for token_id in token_ids:
            if self._ended:
                break
            found = self._first_stop(self._advance(token_id))
            if found is not None:
                position, stop_string = found
                text += self._pending[:position]
                self._pending, self._ended = "", True
                return TextDelta(text, stop_string)
            text += self._release(len(self._pending) - self._possible_stop_length())
        return TextDelta(text)

    def finish(self) -> str:
        """The text still held back, now that no token follows: the beginning of a stop string, a broken character."""
        if self._ended:
            return ""
        self._ended = True
        # Only one that contains U+FFFD itself can have come about now.
        found = self._first_stop(self._new_text(self._window_text))
        return self._pending if found is None else self._pending[: found[0]]

    def restore(self, token_ids: Sequence[int]) -> TextDelta:
        """Bring a fresh stream to where it stood after these tokens; returns all the text it had given out by then."""
        return self.push(token_ids)

    def _advance(self, token_id: int) -> str:
        """Take one token into the window and return the text that is certain to be whole."""
        text = self._decode([*self._window, token_id])
        # Skipped tokens (special ones) must not push real ones out of the window. A token that only adds nothing
        # *here*, such as the space that some decoders strip from the front, gives text when it is doubled.
        if text == self._window_text and not self._decode([token_id, token_id]):
            return ""
        self._window.append(token_id)
        self._window_text = text
        if not text.endswith(_INCOMPLETE):
            new_text = self._new_text(text)
            self._slide(self._read)
            self._read_text = self._window_text
            return new_text
        if len(self._window) - self._read < _MAX_HELD_TOKENS:
            # What stands before the open character is certain: a token can end one and begin the next.
            certain = text.rstrip(_INCOMPLETE)
            if not certain.startswith(self._read_text):
                return ""
            new_text, self._read_text = certain[len(self._read_text) :], certain
            return new_text
        # Broken bytes. All is final but the last replacement character, which the next token may still complete.
        new_text = self._new_text(text).removesuffix(_INCOMPLETE)
        self._slide(len(self._window) - _RESYNCHRONISE_TOKENS)
        self._read_text = self._window_text.removesuffix(_INCOMPLETE)
        return new_text

    def _new_text(self, window_text: str) -> str:
        if window_text.startswith(self._read_text):
            return window_text[len(self._read_text) :]
        # A byte-fallback decoder spoils a whole run of bytes when one of them is bad, those already given out too.
        return self._decode(self._window[self._read :])

    def _slide(self, first: int) -> None:
        self._window = self._window[first:]
        self._read = len(self._window)
        self._window_text = self._decode(self._window)

    def _release(self, length: int) -> str:
        """So much of the pending text, which is certain now."""
        released, self._pending = self._pending[:length], self._pending[length:]
        if self._gate is not None and released:
            self._gate.advance(released)
        return released

    def _first_stop(self, new_text: str) -> tuple[int, str] | None:
        """Take new text; where the pending text ends then, and the stop string that ends it."""
        old_length = len(self._pending)
        self._pending += new_text
        passed = 0
        while True:
            # Those that the old text holds whole were refused when they came.
            places = [
                (self._pending.find(string, max(passed, old_length - len(string) + 1)), string) for string in self._stop
            ]
            found = min((place for place in places if place[0] >= 0), key=lambda place: place[0], default=None)
            if found is None or self._gate is None or self._gate.may_end(self._pending[: found[0]]):
                return found
            passed = found[0] + 1

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the pending text with which a stop string begins, and goes on after it."""
        for length in range(min(self._longest_stop - 1, len(self._pending)), 0, -1):
            end = self._pending[-length:]
            if any(len(string) > length and string.startswith(end) for string in self._stop):
                return length
        return 0

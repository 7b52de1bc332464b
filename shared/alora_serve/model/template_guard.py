"""Keeps special-token text that a user writes from becoming special tokens.

The chat template mixes its own text with the user's, and a tokenizer cannot tell whose ``<|im_start|>`` it reads. So
every occurrence of an added token's text in a user's string is cut in two *before* rendering, by a random number that
nobody can guess and that survives trimming, changes of case and JSON or HTML quoting. The rendered text is split at
those numbers again and the pieces are tokenized apart: no piece holds the whole token any more.

What this cannot see is a template that itself takes characters out of the middle of a string, or changes them, so that
the rest becomes a token; and a token whose text begins or ends with white space, put together over a string's border.

Added tokens of nothing but white space are left alone: they are part of ordinary prose (runs of spaces and line ends,
in the tokenizers that have them) and can forge no control token.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

_SENTINEL_DIGITS = 40


@dataclass(frozen=True, slots=True)
class CutText:
    """Text and the places, ascending and inside it, at which it must be tokenized apart."""

    text: str
    cuts: tuple[int, ...] = ()

    def pieces(self) -> Iterator[str]:
        """The text between the cuts, in order."""
        for start, end in pairwise((0, *self.cuts, len(self.text))):
            yield self.text[start:end]

    def part(self, start: int, end: int | None = None) -> CutText:
        """The text from ``start`` to ``end`` with its cuts."""
        end = len(self.text) if end is None else end
        return CutText(self.text[start:end], tuple(cut - start for cut in self.cuts if start < cut < end))


class AddedTokenTexts:
    """The texts of a tokenizer's added tokens, special or not, for finding them and what could become one."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Texts of white space only are dropped (see the module's docstring)."""
        self._texts = frozenset(text for text in texts if text.strip())
        lengths: dict[str, set[int]] = {}
        for text in self._texts:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(sizes) for first, sizes in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(sorted(lengths)))}]" if lengths else "(?!)")
        self._longest = max(map(len, self._texts), default=0)
        self._prefixes = frozenset(text[:end] for text in self._texts for end in range(1, len(text)))
        self._suffixes = frozenset(text[start:] for text in self._texts for start in range(1, len(text)))
        self._all = "\0".join(sorted(self._texts))

    def __contains__(self, text: str) -> bool:
        return text in self._texts

    def occurrences(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of each occurrence, overlapping ones too; of several that start together, the shortest."""
        for match in self._first.finditer(text):
            start = match.start()
            for length in self._lengths[match[0]]:
                if text[start : start + length] in self._texts:
                    yield start, start + length
                    break

    def cuts(self, text: str) -> set[int]:
        """Places that lie inside every occurrence; on both sides of one that is a single character."""
        return {place for start, end in self.occurrences(text) for place in _inside(start, end)}

    def spans(self, text: str, place: int) -> bool:
        """Whether an occurrence begins before ``place`` and ends after it."""
        return any(
            start + length > place and text[start : start + length] in self._texts
            for start in range(max(0, place - self._longest + 1), place)
            for length in self._lengths.get(text[start], ())
        )

    def may_straddle(self, text: str) -> bool:
        """Whether ``text``, stripped, together with what comes before or after it could spell an added token."""
        core = text.strip()
        lengths = range(1, min(self._longest, len(core) + 1))
        return bool(core) and (
            core in self._all
            or any(core[-length:] in self._prefixes or core[:length] in self._suffixes for length in lengths)
        )


def _inside(start: int, end: int) -> tuple[int, ...]:
    return ((start + end) // 2,) if end - start > 1 else (start, end)


class RequestGuard:
    """Cuts the user's strings of one request, and finds the cuts again in what the template made of them."""

    def __init__(self, texts: AddedTokenTexts) -> None:
        self._texts = texts
        self.marker = _random_digits()
        """A string that appears nowhere else in the request."""
        self._inner = _random_digits()
        self._edge = _random_digits()
        self._sentinels = re.compile(f"({self._inner}|{self._edge})")

    def render(self, render: Callable[[Callable[[str], str]], str]) -> CutText:
        """Call ``render`` with a function to apply to every string of the user, and return what it rendered, cut.

        A token's text can also arise where two strings meet, or a string and the template's own text. Where that looks
        possible, the conversation is rendered once more with sentinels around the strings at risk too; of those only
        the ones inside an occurrence become cuts, so that nothing else in the conversation is tokenized differently.
        A template that renders other text because of them (it compares the string, say) keeps its first rendering,
        unless the second one has fewer occurrences.
        """
        at_risk = False

        def cut_inside(text: str) -> str:
            nonlocal at_risk
            at_risk = at_risk or self._texts.may_straddle(text)
            return self._mark(text)

        plain, inner_cuts, _ = self._unmark(render(cut_inside))
        first = self._cut(plain, inner_cuts)
        if not at_risk:
            return first
        text, inner_cuts, edge_cuts = self._unmark(render(self._mark_edges))
        if text == plain:
            return self._cut(text, inner_cuts | {cut for cut in edge_cuts if self._texts.spans(text, cut)})
        second = self._cut(text, inner_cuts | edge_cuts)
        return second if self._remaining(second) < self._remaining(first) else first

    def clean(self, text: str) -> str:
        """``text`` with the sentinels taken out, for showing it to people."""
        return self._sentinels.sub("", text)

    def _mark(self, text: str) -> str:
        places = (0, *sorted(self._texts.cuts(text)), len(text))
        return self._inner.join(text[start:end] for start, end in pairwise(places))

    def _mark_edges(self, text: str) -> str:
        if not self._texts.may_straddle(text):
            return self._mark(text)
        core = text.strip()
        start = text.index(core)
        return f"{text[:start]}{self._edge}{self._mark(core)}{self._edge}{text[start + len(core) :]}"

    def _unmark(self, rendered: str) -> tuple[str, set[int], set[int]]:
        texts: list[str] = []
        cuts: dict[str, set[int]] = {self._inner: set(), self._edge: set()}
        length = 0
        for part in self._sentinels.split(rendered):
            if part in cuts:
                cuts[part].add(length)
            else:
                texts.append(part)
                length += len(part)
        return "".join(texts), cuts[self._inner], cuts[self._edge]

    @staticmethod
    def _cut(text: str, cuts: set[int]) -> CutText:
        return CutText(text, tuple(sorted(cuts - {0, len(text)})))

    def _remaining(self, cut_text: CutText) -> int:
        return sum(1 for piece in cut_text.pieces() for _ in self._texts.occurrences(piece))


def _random_digits() -> str:
    return f"{secrets.randbelow(10**_SENTINEL_DIGITS):0{_SENTINEL_DIGITS}}"

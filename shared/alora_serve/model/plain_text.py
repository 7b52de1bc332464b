"""A fast tokenizer as plain functions: cut text to token ids, ids to text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from alora_serve.errors import InvalidRequestError, ModelUnsupportedError
from alora_serve.model.template_guard import AddedTokenTexts, CutText
from alora_serve.model.token_lengths import longest_token_bytes
from alora_serve.types import TokenIds


class PlainTextTokenizer:
    """Encodes the pieces of a :class:`~alora_serve.model.template_guard.CutText` apart and joins them as ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises :class:`~alora_serve.errors.ModelUnsupportedError` for a tokenizer that is not a fast one."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelUnsupportedError(
                f"{type(tokenizer).__name__} has no fast tokenizer; the model needs a tokenizer.json"
            )
        # A private copy: truncation, padding and the splitting of special tokens are state that others could change.
        self._backend: Tokenizer = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self.added_texts = AddedTokenTexts(token.content for token in added.values())
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        unknown = self._unknown_id()
        self._forgeable = {
            token_id: token.content
            for token_id, token in added.items()
            if token.content in self.added_texts and token_id != unknown
        }
        self._anchor = self._anchor_ids()
        self._longest_token_bytes = longest_token_bytes(self.serialized)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def serialized(self) -> dict[str, Any]:
        """Vocabulary, merges, added tokens and every processing step, as in ``tokenizer.json``."""
        state: dict[str, Any] = json.loads(self._backend.to_str())
        return state

    def least_tokens(self, text: str) -> int:
        """What a text comes to at least: 0 where this tokenizer does not say how much one token can stand for."""
        longest = self._longest_token_bytes
        return 0 if longest is None else -(-len(text.encode(errors="surrogatepass")) // longest)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens spelt out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def encode(self, cut_text: CutText, *, at_start: bool) -> TokenIds:
        """Ids of the pieces, joined. ``at_start``: the first piece begins the whole prompt.

        Raises :class:`~alora_serve.errors.InvalidRequestError` when a special token of a single character is in the
        text and the vocabulary has no other spelling for that character.
        """
        token_ids: list[int] = []
        for piece in filter(None, cut_text.pieces()):
            if len(piece) == 1 and piece in self.added_texts:
                token_ids += self._encode_unmatched(piece)
            else:
                token_ids += self._encode_piece(piece, at_start=at_start and not token_ids)
        return tuple(token_ids)

    def encode_raw(self, text: str) -> TokenIds:
        """Ids of a whole prompt as ``tokenizer(text)`` gives them: added tokens found, special ones put around it."""
        return tuple(_encoding(self._backend, text, add_special_tokens=True).ids)

    def border(self, text: str, position: int) -> int:
        """The last place at or before ``position`` where one token ends and the next may begin."""
        offsets = _encoding(self._backend, text).offsets
        return max((place for span in offsets for place in span if place <= position), default=0)

    def _encode_piece(self, text: str, *, at_start: bool) -> list[int]:
        encoding = _encoding(self._backend, text)
        token_ids: list[int] = encoding.ids
        forged = self._forged(text, encoding)
        if forged:
            token_ids, place = [], 0
            for start, end in (*forged, (len(text), len(text))):
                if place < start:
                    token_ids += self._encode_piece(text[place:start], at_start=at_start and place == 0)
                token_ids += self._encode_unmatched(text[start:end])
                place = end
            return token_ids
        if at_start or not self._anchor:
            return token_ids
        anchored: list[int] = _encoding(self._backend, "\n" + text).ids
        length = len(self._anchor)
        return anchored[length:] if anchored[:length] == self._anchor else token_ids

    def _forged(self, text: str, encoding: Encoding) -> list[tuple[int, int]]:
        """Where a normalizer turned other characters (full-width letters, say) into an added token's text."""
        if self._backend.normalizer is None:
            return []
        return [
            (start, end)
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in self._forgeable and self._forgeable[token_id] not in text[start:end]
        ]

    def _encode_unmatched(self, text: str) -> list[int]:
        token_ids: list[int] = _encoding(self._without_added_tokens, text).ids
        if any(token_id in self.special_ids and token_id in self._forgeable for token_id in token_ids):
            raise InvalidRequestError.of("prompt", f"{text!r} is a special token of this model and cannot be text")
        return token_ids

    @cached_property
    def _without_added_tokens(self) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(self.serialized | {"added_tokens": []}))

    def _unknown_id(self) -> int | None:
        """Id that stands for any text outside the vocabulary; not a sign that somebody wrote that token."""
        model = self.serialized["model"]
        token = model.get("unk_token")
        return model.get("unk_id") if token is None else self._backend.token_to_id(token)

    def _anchor_ids(self) -> list[int]:
        """Ids of a line end to encode before a piece and take off again, empty when pieces need none.

        Tokenizers in the manner of SentencePiece put a space before whatever text they are given; behind a line end,
        which they leave alone, a piece gets the ids that it has in the middle of a text.
        """
        line_end: list[int] = _encoding(self._backend, "\n").ids
        anchored: list[int] = _encoding(self._backend, "\na").ids
        alone: list[int] = _encoding(self._backend, "a").ids
        in_the_middle = anchored[: len(line_end)] == line_end and anchored[len(line_end) :] != alone
        return line_end if in_the_middle else []


def _encoding(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> Encoding:
    # As a batch of one: `encode` holds Python's lock throughout, and a long text would stop every other thread.
    return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

"""A model's tokens as bytes, and arranged for llguidance."""

from __future__ import annotations

import json
import threading
from functools import cached_property

import structlog
from llguidance import LLTokenizer

from alora_serve.errors import UnimplementedFeatureError
from alora_serve.model.chat import ChatTokenizer

_log = structlog.get_logger(__name__)


class TokenVocabulary:
    """The token ids of one model. Thread-safe; arranging them takes about a second, at first use or in :meth:`warm`."""

    def __init__(self, tokenizer: ChatTokenizer, vocabulary_size: int) -> None:
        """``vocabulary_size`` is the number of rows of the model's output, padding included."""
        self.size = vocabulary_size
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Arrange the tokens now."""
        self._arranged()

    @property
    def tokens(self) -> LLTokenizer:
        """For matchers.

        Raises:
            UnimplementedFeatureError: the tokenizer's tokens cannot be told as bytes.
        """
        arranged = self._arranged()
        if arranged is None:
            raise UnimplementedFeatureError(
                "sampling.structured_output: this model's tokenizer is neither byte-level nor falls back to bytes"
            )
        return arranged

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, a character's part if need be; of a special token, its name."""
        arranged = self._arranged()
        if arranged is None or token_id >= self._tokenizer.vocabulary_size:
            return self._tokenizer.spell([token_id]).encode()
        return arranged.decode_bytes([token_id])

    def _arranged(self) -> LLTokenizer | None:
        with self._lock:
            return self._built

    @cached_property
    def _built(self) -> LLTokenizer | None:
        known = self._tokenizer.vocabulary_size
        ends = sorted(token for token in self._tokenizer.end_of_sequence_ids if token < known)
        try:
            return LLTokenizer(
                json.dumps(self._tokenizer.serialized),
                n_vocab=max(self.size, known),
                # It takes no text for an end. Without one it would guess: better the last id, most likely an added one.
                eos_token=ends or [known - 1],
            )
        except ValueError as error:
            _log.warning(
                "structured output is not served: the tokenizer's tokens cannot be told as bytes", error=str(error)
            )
            return None

"""One answer bound to a form: which tokens may come next, and whether it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from alora_serve.errors import AloraServeError, InvalidRequestError
from alora_serve.model.structure.compiler import CompiledForm
from alora_serve.model.structure.forms import complaint


@contextmanager
def _contained() -> Iterator[None]:
    """Whatever fails is an answer's own error. A panic in Rust is no Exception, and would end more than the answer."""
    try:
        yield
    except AloraServeError:
        raise
    except BaseException as error:
        raise AloraServeError(f"the form of the answer cannot be followed: {error!r}") from error


class FormUsedUpError(AloraServeError):
    """Answers that share what is compiled have used up its limits: it is to be compiled anew."""


class Constraint:
    """Follows one answer. Its state is a function of the form and the tokens; one thread at a time.

    All but its making may raise an ``AloraServeError``, and nothing else: what defects in llguidance come to.

    Attributes:
        has_ended: the last token was an end, which is no part of what has the form.
    """

    def __init__(self, form: CompiledForm, end_ids: frozenset[int]) -> None:
        """Stand before the first token.

        ``end_ids`` are the tokens that end the answer where it has the form. Elsewhere they are tokens like any other.
        """
        self._form = form
        self._size = form.vocabulary.size
        self._end_ids = end_ids
        self._ends = np.array(sorted(token for token in end_ids if token < self._size), dtype=np.intp)
        self._no_ends = np.array(sorted({*form.vocabulary.tokens.eos_tokens} - end_ids), dtype=np.intp)
        self._tokens: list[int] = []
        self._text = ""
        self.has_ended = False
        self._matcher = form.matcher()
        self._text_matcher: LLMatcher | None = None
        # From the last: what others renewed before may be used up, too.
        self._renewals: list[Callable[[CompiledForm], CompiledForm]] = [
            CompiledForm.alone,
            CompiledForm.renewed,
            CompiledForm.renewed,
        ]

    @_contained()
    def restore(self, token_ids: Sequence[int]) -> None:
        """Go on after these tokens.

        Raises:
            InvalidRequestError: they are no beginning of an answer of this form, or it has become too complex.
        """
        for token_id in token_ids:
            if self.has_ended or not (self._matcher.validate_tokens([token_id]) or self._allows(token_id)):
                told = "they do not have the form of structured_output"
                raise InvalidRequestError.of("resume.generated_token_ids", told)
            self._consume(token_id)

    @_contained()
    def push(self, token_id: int) -> None:
        """Go on after a token that :meth:`mask` allowed. Takes microseconds; what fails shows in the next mask."""
        self._consume(token_id)

    @property
    @_contained()
    def is_complete(self) -> bool:
        """The answer has the form, and has ended or nothing can be added to it."""
        matcher = self._matcher
        return self.has_ended or (matcher.is_stopped() and matcher.is_accepting() and not matcher.is_error())

    @_contained()
    def mask(self) -> bytes:
        """A bit for each token id, little-endian: whether it may come next. Takes microseconds, at first milliseconds.

        Raises:
            FormUsedUpError: the form has to be renewed first, as :meth:`patient_mask` does.
            InvalidRequestError: no token may, or the form has become too complex.
        """
        computed = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            told = complaint(self._form.form, self._matcher.get_error())
            if self._renewals:
                raise FormUsedUpError(str(told))
            raise told
        packed = np.frombuffer(bytearray(computed), dtype=np.uint8)
        _clear(packed, self._no_ends)
        if self._matcher.is_accepting():
            np.bitwise_or.at(packed, self._ends >> 3, _bits(self._ends))
        # A tokenizer may have ids that its model has no logits for.
        packed[self._size >> 3 :] &= np.array([(1 << (self._size & 7)) - 1], dtype=np.uint8)
        packed[(self._size >> 3) + 1 :] = 0
        if not packed.any():
            raise complaint(self._form.form, "no token of this model can go on with the answer")
        return packed.tobytes()

    @_contained()
    def patient_mask(self) -> bytes:
        """The mask; where the form has to be renewed that is done first, which may take a minute.

        Raises:
            InvalidRequestError: as :meth:`mask`.
        """
        while True:
            try:
                return self.mask()
            except FormUsedUpError:
                self._catch_up()

    @_contained()
    def advance(self, text: str) -> None:
        """See :class:`alora_serve.model.text.TextGate`."""
        self._text += text
        self._text_matcher = self._with_text(self._text_matcher or self._form.matcher(), text)

    @_contained()
    def may_end(self, text: str) -> bool:
        """See :class:`alora_serve.model.text.TextGate`."""
        matcher = self._with_text((self._text_matcher or self._form.matcher()).deep_copy(), text)
        return matcher.is_accepting() and not matcher.is_error()

    def _allows(self, token_id: int) -> bool:
        """Whether this token may come next, as a part of the answer or as its end, were all limits unused."""
        return bool(self.patient_mask()[token_id >> 3] >> (token_id & 7) & 1)

    def _consume(self, token_id: int) -> None:
        if token_id in self._end_ids and self._matcher.is_accepting():
            self.has_ended = True
            return
        self._tokens.append(token_id)
        self._matcher.consume_tokens([token_id])

    def _catch_up(self) -> None:
        """Renew the form and follow the answer up to here.

        What other answers needed is no fault of this one: it shares a form again, and where others use that up as well,
        has one for itself.
        """
        while self._renewals:
            self._form = self._renewals.pop()(self._form)
            self._matcher = self._form.matcher()
            if self._matcher.consume_tokens(self._tokens):
                self._text_matcher = self._with_text(self._form.matcher(), self._text) if self._text else None
                return

    def _with_text(self, matcher: LLMatcher, text: str) -> LLMatcher:
        matcher.consume_tokens(self._form.vocabulary.tokens.greedy_tokenize(text))
        return matcher


def _bits(token_ids: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Of each token, its bit in its byte of a mask."""
    return (1 << (token_ids & 7)).astype(np.uint8)


def _clear(packed: NDArray[np.uint8], token_ids: NDArray[np.intp]) -> None:
    np.bitwise_and.at(packed, token_ids >> 3, ~_bits(token_ids))

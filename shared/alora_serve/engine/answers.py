"""Prepares answers: what ends them, the form they are bound to, how their tokens are spelt."""

from __future__ import annotations

from alora_serve.engine.answer import Answer, Ending
from alora_serve.kv.tenancy import NO_TENANT
from alora_serve.model.loader import BaseModel
from alora_serve.model.structure.compiler import FormCompiler
from alora_serve.model.structure.constraint import Constraint
from alora_serve.model.structure.vocabulary import TokenVocabulary
from alora_serve.model.text import TextStream
from alora_serve.types import SamplingParams, TokenIds


class AnswerMaker:
    """Makes answers on one model. Thread-safe."""

    def __init__(self, model: BaseModel) -> None:
        self._tokenizer = model.tokenizer
        self._vocabulary = TokenVocabulary(model.tokenizer, model.vocabulary_size)
        self._compiler = FormCompiler(self._vocabulary)

    def warm(self) -> None:
        """Do now, in a second or so, what the first answer with a form or log-probabilities would have to wait for."""
        self._vocabulary.warm()

    @staticmethod
    def takes_time(sampling: SamplingParams) -> bool:
        """Whether :meth:`make` may take long enough to be called in a thread of its own."""
        return sampling.structured_output is not None or sampling.logprobs

    def make(
        self, sampling: SamplingParams, generated: TokenIds, tenant_salt: bytes = NO_TENANT
    ) -> tuple[Answer, Ending | None]:
        """An answer that has come to ``generated``, and its ending where it goes no further; forms are a tenant's own.

        Raises:
            InvalidRequestError: its form cannot be held to, or ``generated`` does not have it; names the part.
            UnimplementedFeatureError: it has a form, and the model's tokenizer allows none.
        """
        own = frozenset[int]() if sampling.ignore_eos else self._tokenizer.end_of_sequence_ids
        end_ids = own | frozenset(sampling.stop_token_ids)
        form, constraint = sampling.structured_output, None
        if form is not None:
            constraint = Constraint(self._compiler.compile(form, tenant_salt), end_ids)
        if sampling.logprobs:
            self._vocabulary.warm()  # here and not between two tokens of everybody's
        answer = Answer(
            TextStream(self._tokenizer.decode, sampling.stop, constraint),
            sampling.most_tokens,
            end_ids,
            constraint,
            self._vocabulary.token_bytes if sampling.logprobs else None,
        )
        return answer, answer.restore(generated)

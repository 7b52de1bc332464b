"""Which texts have a form, asked of a small tokenizer's masks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alora_serve.errors import InvalidRequestError
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.structure.compiler import FormCompiler
from alora_serve.model.structure.constraint import Constraint
from alora_serve.model.structure.vocabulary import TokenVocabulary
from alora_serve.types import JsonSchema, StructuredOutput
from small_tokenizers import byte_level_tokenizer

TOKENIZER = ChatTokenizer(byte_level_tokenizer())
VOCABULARY = TokenVocabulary(TOKENIZER, TOKENIZER.vocabulary_size + 7)
COMPILER = FormCompiler(VOCABULARY)
[END] = TOKENIZER.end_of_sequence_ids


def holds(form: StructuredOutput, text: str) -> bool:
    """Whether a text has a form, each of its tokens being allowed after those before."""
    constraint = Constraint(COMPILER.compile(form), frozenset([END]))
    for token in VOCABULARY.tokens.greedy_tokenize(text):
        if not allowed(constraint, token):
            return False
        constraint.push(token)
    return constraint.is_complete or allowed(constraint, END)


def allowed(constraint: Constraint, token: int) -> bool:
    return bool(constraint.patient_mask()[token >> 3] >> (token & 7) & 1)


def schema(**keywords: Any) -> JsonSchema:
    return JsonSchema(json.dumps(keywords))


def refusal(form: StructuredOutput) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        COMPILER.compile(form)
    return caught.value

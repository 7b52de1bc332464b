"""Intrinsics: well-defined questions that adapters are trained to answer, as their ``io.yaml`` defines them.

Pure but for the sentence splitter, which is imported when a definition first needs it. No protobuf, no torch.
"""

from alora_serve.intrinsics.answer import Answer, ScoredToken
from alora_serve.intrinsics.conversation import Question, ask
from alora_serve.intrinsics.definition import FILE_NAME, IntrinsicDefinition, parse_definition
from alora_serve.intrinsics.documents import with_documents_placed
from alora_serve.intrinsics.fields import MAX_DEFINITION_BYTES
from alora_serve.intrinsics.results import Outcome, conclude

__all__ = [
    "FILE_NAME",
    "MAX_DEFINITION_BYTES",
    "Answer",
    "IntrinsicDefinition",
    "Outcome",
    "Question",
    "ScoredToken",
    "ask",
    "conclude",
    "parse_definition",
    "with_documents_placed",
]

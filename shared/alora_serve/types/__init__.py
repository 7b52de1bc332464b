"""The domain objects that cross module borders: what a request asks for, what a stream answers, what services report.

Frozen, torch-free and gRPC-free. ``rpc/convert`` alone translates them from and to protobuf. Token ids are tuples of
ints here and packed little-endian uint32 on the wire.
"""

from alora_serve.types.answer import (
    ContinuationScore,
    Finished,
    FinishReason,
    Heartbeat,
    PrefillResult,
    ScoreResult,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    TokenizedPrompt,
    TokenLogprob,
    Usage,
)
from alora_serve.types.identity import (
    ANYONE,
    Identity,
    Role,
)
from alora_serve.types.ids import (
    AdapterDigest,
    TokenIds,
)
from alora_serve.types.intrinsic import (
    IntrinsicResult,
    IntrinsicRun,
)
from alora_serve.types.prompt import (
    DOCUMENT_ROLE,
    ROLES,
    ChatMessage,
    Document,
    PrefixHandle,
    Prompt,
    PromptKind,
    ToolCall,
    is_role,
)
from alora_serve.types.request import (
    GenerateRequest,
    Resume,
    SamplingParams,
    ScoreRequest,
)
from alora_serve.types.status import (
    AdapterInfo,
    EndpointStatus,
    ModelInfo,
    PrefixDigest,
    ServingLoad,
)
from alora_serve.types.structure import (
    Choice,
    Grammar,
    JsonSchema,
    Regex,
    StructuredOutput,
)

__all__ = [
    "ANYONE",
    "DOCUMENT_ROLE",
    "ROLES",
    "AdapterDigest",
    "AdapterInfo",
    "ChatMessage",
    "Choice",
    "ContinuationScore",
    "Document",
    "EndpointStatus",
    "FinishReason",
    "Finished",
    "GenerateRequest",
    "Grammar",
    "Heartbeat",
    "Identity",
    "IntrinsicResult",
    "IntrinsicRun",
    "JsonSchema",
    "ModelInfo",
    "PrefillResult",
    "PrefixDigest",
    "PrefixHandle",
    "Prompt",
    "PromptKind",
    "Regex",
    "Resume",
    "Role",
    "SamplingParams",
    "ScoreRequest",
    "ScoreResult",
    "ServingLoad",
    "Started",
    "StreamEvent",
    "StructuredOutput",
    "Timings",
    "TokenChunk",
    "TokenIds",
    "TokenLogprob",
    "TokenizedPrompt",
    "ToolCall",
    "Usage",
    "is_role",
]

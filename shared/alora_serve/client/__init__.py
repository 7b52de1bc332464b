"""The Python client of ``AloraService``: :class:`Client` for threads, :class:`AsyncClient` for asyncio.

Everything a caller needs is importable from here; errors are those of :mod:`alora_serve.errors`.
"""

from alora_serve.client.arguments import Messages
from alora_serve.client.async_streams import AsyncFanOutStream, AsyncGenerationStream, AsyncSampleStream
from alora_serve.client.asynchronous import AsyncClient
from alora_serve.client.intrinsics import AsyncIntrinsicsStream, IntrinsicsStream
from alora_serve.client.results import GenerationResult
from alora_serve.client.retry import RetryPolicy
from alora_serve.client.streams import FanOutStream, GenerationStream, SampleStream
from alora_serve.client.synchronous import Client
from alora_serve.rpc.convert import Target
from alora_serve.types import (
    AdapterInfo,
    ChatMessage,
    Choice,
    ContinuationScore,
    Document,
    Finished,
    FinishReason,
    Grammar,
    Heartbeat,
    IntrinsicResult,
    JsonSchema,
    ModelInfo,
    PrefillResult,
    PrefixHandle,
    Prompt,
    Regex,
    SamplingParams,
    ScoreResult,
    Started,
    StreamEvent,
    StructuredOutput,
    Timings,
    TokenChunk,
    TokenizedPrompt,
    TokenLogprob,
    ToolCall,
    Usage,
)

__all__ = [
    "AdapterInfo",
    "AsyncClient",
    "AsyncFanOutStream",
    "AsyncGenerationStream",
    "AsyncIntrinsicsStream",
    "AsyncSampleStream",
    "ChatMessage",
    "Choice",
    "Client",
    "ContinuationScore",
    "Document",
    "FanOutStream",
    "FinishReason",
    "Finished",
    "GenerationResult",
    "GenerationStream",
    "Grammar",
    "Heartbeat",
    "IntrinsicResult",
    "IntrinsicsStream",
    "JsonSchema",
    "Messages",
    "ModelInfo",
    "PrefillResult",
    "PrefixHandle",
    "Prompt",
    "Regex",
    "RetryPolicy",
    "SampleStream",
    "SamplingParams",
    "ScoreResult",
    "Started",
    "StreamEvent",
    "StructuredOutput",
    "Target",
    "Timings",
    "TokenChunk",
    "TokenLogprob",
    "TokenizedPrompt",
    "ToolCall",
    "Usage",
]

"""The only translator between protobuf messages and domain objects, with all checks of form and range.

``x_from_proto`` raises :class:`~alora_serve.errors.InvalidRequestError` with the paths of all bad fields, and
``x_to_proto`` is its inverse. What needs the model, such as the context length, is checked by the engine.
"""

from alora_serve.rpc.convert.endpoints import (
    adapter_from_proto,
    adapter_to_proto,
    endpoint_status_from_proto,
    endpoint_status_to_proto,
    model_from_proto,
    model_to_proto,
)
from alora_serve.rpc.convert.events import (
    event_from_proto,
    event_to_proto,
    finish_reason_name,
    timings_from_proto,
    timings_to_proto,
    usage_from_proto,
    usage_to_proto,
)
from alora_serve.rpc.convert.inspection import (
    Scoring,
    score_from_proto,
    score_result_from_proto,
    score_result_to_internal_proto,
    score_result_to_proto,
    score_to_proto,
    scoring_from_proto,
    scoring_to_proto,
    tokenize_to_proto,
    tokenized_from_proto,
    tokenized_to_proto,
)
from alora_serve.rpc.convert.prompt import handle_from_proto, handle_to_proto, prompt_from_proto, prompt_to_proto
from alora_serve.rpc.convert.requests import (
    FanOut,
    Target,
    adapter_name_from_proto,
    decode_from_proto,
    decode_to_proto,
    fan_out_from_proto,
    fan_out_to_proto,
    generate_from_proto,
    generate_to_proto,
    prefill_from_proto,
    prefill_result_from_proto,
    prefill_result_to_internal_proto,
    prefill_result_to_proto,
)
from alora_serve.rpc.convert.sampling import (
    MAX_SAMPLES,
    resume_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from alora_serve.rpc.convert.tokens import pack_token_ids, unpack_token_ids

__all__ = [
    "MAX_SAMPLES",
    "FanOut",
    "Scoring",
    "Target",
    "adapter_from_proto",
    "adapter_name_from_proto",
    "adapter_to_proto",
    "decode_from_proto",
    "decode_to_proto",
    "endpoint_status_from_proto",
    "endpoint_status_to_proto",
    "event_from_proto",
    "event_to_proto",
    "fan_out_from_proto",
    "fan_out_to_proto",
    "finish_reason_name",
    "generate_from_proto",
    "generate_to_proto",
    "handle_from_proto",
    "handle_to_proto",
    "model_from_proto",
    "model_to_proto",
    "pack_token_ids",
    "prefill_from_proto",
    "prefill_result_from_proto",
    "prefill_result_to_internal_proto",
    "prefill_result_to_proto",
    "prompt_from_proto",
    "prompt_to_proto",
    "resume_to_proto",
    "sampling_from_proto",
    "sampling_to_proto",
    "score_from_proto",
    "score_result_from_proto",
    "score_result_to_internal_proto",
    "score_result_to_proto",
    "score_to_proto",
    "scoring_from_proto",
    "scoring_to_proto",
    "timings_from_proto",
    "timings_to_proto",
    "tokenize_to_proto",
    "tokenized_from_proto",
    "tokenized_to_proto",
    "unpack_token_ids",
    "usage_from_proto",
    "usage_to_proto",
]

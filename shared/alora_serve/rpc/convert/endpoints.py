"""What services say about themselves: their model, adapters and load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from alora_serve.rpc.convert.tokens import pack_token_ids, unpack_token_ids
from alora_serve.types import AdapterDigest, AdapterInfo, EndpointStatus, ModelInfo, PrefixDigest
from alora_serve.v1 import types_pb2

_ADAPTER_KINDS: Final[Mapping[str, types_pb2.AdapterKind.ValueType]] = {
    "alora": types_pb2.ADAPTER_KIND_ALORA,
    "lora": types_pb2.ADAPTER_KIND_LORA,
}
_ADAPTER_KINDS_FROM_PROTO: Final = {number: kind for kind, number in _ADAPTER_KINDS.items()}


def adapter_to_proto(adapter: AdapterInfo) -> types_pb2.Adapter:
    """One adapter; a refused one may have no kind."""
    return types_pb2.Adapter(
        name=adapter.name,
        digest=adapter.digest,
        kind=_ADAPTER_KINDS.get(adapter.kind, types_pb2.ADAPTER_KIND_UNSPECIFIED),
        rank=adapter.rank,
        target_modules=adapter.target_modules,
        invocation_token_ids=pack_token_ids(adapter.invocation_tokens),
        invocation_text=adapter.invocation_text,
        size_bytes=adapter.size_bytes,
        resident=adapter.resident,
        problem=adapter.problem,
        intrinsic_digest=adapter.intrinsic_digest,
    )


def adapter_from_proto(message: types_pb2.Adapter) -> AdapterInfo:
    """One adapter; ``kind`` is empty when it is unset or unknown to this version.

    Raises:
        InvalidRequestError: invocation tokens that are not packed tokens.
    """
    return AdapterInfo(
        name=message.name,
        digest=AdapterDigest(message.digest),
        kind=_ADAPTER_KINDS_FROM_PROTO.get(message.kind, ""),
        rank=message.rank,
        target_modules=tuple(message.target_modules),
        invocation_tokens=unpack_token_ids(message.invocation_token_ids, "adapter.invocation_token_ids"),
        invocation_text=message.invocation_text,
        size_bytes=message.size_bytes,
        resident=message.resident,
        problem=message.problem,
        intrinsic_digest=message.intrinsic_digest,
    )


def model_to_proto(model: ModelInfo) -> types_pb2.Model:
    """The base model."""
    return types_pb2.Model(
        name=model.name,
        model_digest=model.model_digest,
        storage_digest=model.storage_digest,
        architecture=model.architecture,
        dtype=model.dtype,
        context_tokens=model.context_tokens,
        vocabulary_size=model.vocabulary_size,
        block_tokens=model.block_tokens,
        kv_bytes_per_token=model.kv_bytes_per_token,
        takes_documents=model.takes_documents,
    )


def model_from_proto(message: types_pb2.Model) -> ModelInfo:
    """The base model."""
    return ModelInfo(
        name=message.name,
        model_digest=message.model_digest,
        storage_digest=message.storage_digest,
        architecture=message.architecture,
        dtype=message.dtype,
        context_tokens=message.context_tokens,
        vocabulary_size=message.vocabulary_size,
        block_tokens=message.block_tokens,
        kv_bytes_per_token=message.kv_bytes_per_token,
        takes_documents=message.takes_documents,
    )


def endpoint_status_to_proto(status: EndpointStatus) -> types_pb2.EndpointStatus:
    """A service's report about itself."""
    return types_pb2.EndpointStatus(
        model=model_to_proto(status.model),
        draining=status.draining,
        queued=status.queued,
        running=status.running,
        max_running=status.max_running,
        step_seconds=status.step_seconds,
        kv_bytes=status.kv_bytes,
        fetch_bytes_per_second=status.fetch_bytes_per_second,
        prefill_tokens_per_second=status.prefill_tokens_per_second,
        adapters=[adapter_to_proto(adapter) for adapter in status.adapters],
        pending_prefill_tokens=status.pending_prefill_tokens,
        adapter_load_seconds=status.adapter_load_seconds,
        sequence_seconds=status.sequence_seconds,
        resident_prefixes=types_pb2.PrefixDigest(
            stride_tokens=status.resident_prefixes.stride_tokens,
            fingerprints=sorted(status.resident_prefixes.fingerprints),
        ),
        longest_step_seconds=status.longest_step_seconds,
    )


def endpoint_status_from_proto(message: types_pb2.EndpointStatus) -> EndpointStatus:
    """A service's report about itself.

    Raises:
        InvalidRequestError: an adapter whose invocation tokens are not packed tokens.
    """
    return EndpointStatus(
        model=model_from_proto(message.model),
        draining=message.draining,
        queued=message.queued,
        running=message.running,
        max_running=message.max_running,
        step_seconds=message.step_seconds,
        kv_bytes=message.kv_bytes,
        fetch_bytes_per_second=message.fetch_bytes_per_second,
        prefill_tokens_per_second=message.prefill_tokens_per_second,
        adapters=tuple(adapter_from_proto(adapter) for adapter in message.adapters),
        pending_prefill_tokens=message.pending_prefill_tokens,
        adapter_load_seconds=message.adapter_load_seconds,
        sequence_seconds=message.sequence_seconds,
        resident_prefixes=PrefixDigest(
            message.resident_prefixes.stride_tokens, frozenset(message.resident_prefixes.fingerprints)
        ),
        longest_step_seconds=message.longest_step_seconds,
    )

"""Errors on the wire: from domain errors to ``google.rpc.Status`` and back, both by closed tables."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # the package has no stubs

from alora_serve import errors
from alora_serve.errors import AloraServeError, FieldViolation, StatusName
from alora_serve.v1 import alora_pb2

ERROR_DOMAIN: Final = "alora_serve"
"""``google.rpc.ErrorInfo.domain`` of every error that this project raises on purpose."""

DETAILS_KEY: Final = "grpc-status-details-bin"
"""Trailing metadata that carries a serialized ``google.rpc.Status``."""

REQUEST_ID_KEY: Final = "x-request-id"
"""Metadata that names a request, both ways."""

# A peer may refuse more than 8 KiB of metadata. There, the message is percent-encoded (three bytes for one) and the
# details are base64 (four for three).
MAX_MESSAGE_BYTES: Final = 1024
MAX_DETAILS_BYTES: Final = 3072

STATUS_CODES: Final[Mapping[StatusName, grpc.StatusCode]] = {
    "CANCELLED": grpc.StatusCode.CANCELLED,
    "INVALID_ARGUMENT": grpc.StatusCode.INVALID_ARGUMENT,
    "DEADLINE_EXCEEDED": grpc.StatusCode.DEADLINE_EXCEEDED,
    "NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "PERMISSION_DENIED": grpc.StatusCode.PERMISSION_DENIED,
    "RESOURCE_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "FAILED_PRECONDITION": grpc.StatusCode.FAILED_PRECONDITION,
    "UNIMPLEMENTED": grpc.StatusCode.UNIMPLEMENTED,
    "INTERNAL": grpc.StatusCode.INTERNAL,
    "UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
}
"""The gRPC status of each name that an error may have."""


class PeerPreconditionError(AloraServeError):
    """A peer of another version refused for a reason that this version has no class for."""

    status = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class PeerPermissionError(AloraServeError):
    """Something between us and the peer, or a peer of another version, does not let this caller in."""

    status = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class PeerAuthenticationError(AloraServeError):
    """Something between us and the peer, or a peer of another version, does not know this caller."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class MessageTooLargeError(AloraServeError):
    """gRPC itself refused a message, ours or the answer, for its size: it will be as large the next time."""

    status = "RESOURCE_EXHAUSTED"
    reason = "MESSAGE_TOO_LARGE"


_BY_REASON: Final[Mapping[str, type[AloraServeError]]] = {
    found.reason: found
    for found in vars(errors).values()
    if inspect.isclass(found) and issubclass(found, AloraServeError)
} | {MessageTooLargeError.reason: MessageTooLargeError}

_BY_CODE: Final[Mapping[grpc.StatusCode, type[AloraServeError]]] = {
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlinePassedError,
    grpc.StatusCode.NOT_FOUND: errors.AdapterNotFoundError,
    grpc.StatusCode.PERMISSION_DENIED: PeerPermissionError,
    grpc.StatusCode.UNAUTHENTICATED: PeerAuthenticationError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.FAILED_PRECONDITION: PeerPreconditionError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnimplementedFeatureError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
}
"""For answers without our ErrorInfo: gRPC itself, a proxy, or a peer of another version. Others: AloraServeError."""


_TOO_LARGE_TEXT: Final = "message larger than max"
"""What gRPC says of a message over a limit, received, sent or decompressed; it gives no reason but this."""

_RESET_TEXT: Final = "RST_STREAM"
"""What gRPC says, with INTERNAL, of a stream that was reset and not ended: proxies do that when its peer has died."""


def internal_error(request_id: str) -> AloraServeError:
    """What a caller is told about a bug: only how to find it in our logs."""
    return AloraServeError(f"internal error; report request id {request_id}")


def status_from_error(error: AloraServeError, request_id: str) -> status_pb2.Status:
    """The rich status of an error, small enough to travel in metadata: long lists of violations are cut short."""
    status = status_pb2.Status(code=STATUS_CODES[error.status].value[0], message=_clip(str(error), MAX_MESSAGE_BYTES))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    status.details.add().Pack(info)
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    violations = [
        error_details_pb2.BadRequest.FieldViolation(
            field=_clip(violation.field, MAX_MESSAGE_BYTES), description=_clip(violation.description, MAX_MESSAGE_BYTES)
        )
        for violation in error.violations
    ]
    space = MAX_DETAILS_BYTES - status.ByteSize()
    kept = 0
    while kept < len(violations) and (space := space - violations[kept].ByteSize() - 4) >= 0:
        kept += 1
    if kept:
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=violations[:kept]))
    return status


def trailing_metadata(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """What makes a plain gRPC error a rich one."""
    return ((DETAILS_KEY, status.SerializeToString()),)


def error_from_rpc(error: grpc.RpcError) -> AloraServeError:
    """The domain error behind a failed call, made with a synchronous or an asyncio stub.

    Its class follows from the reason if the peer gave one that this version knows, otherwise from the code; a stream
    that a proxy reset is UnavailableError, as if the peer had died without a proxy in between.
    ``metadata["request_id"]`` names the request in the server's logs where the server said so.
    """
    # Both grpc.Call and grpc.aio.AioRpcError have these three methods; their common base class has none.
    call: Any = error
    code: grpc.StatusCode = call.code()
    status = _rich_status(call.trailing_metadata() or ())
    return _rebuild(code, call.details() or code.name.lower().replace("_", " "), status)


def is_own_status(error: grpc.RpcError) -> bool:
    """A service of this project ended the call: not gRPC, a proxy or whatever else, whose texts may name addresses."""
    call: Any = error
    info = error_details_pb2.ErrorInfo()
    for detail in _rich_status(call.trailing_metadata() or ()).details:
        detail.Unpack(info)
    return bool(info.domain == ERROR_DOMAIN)


def _rich_status(metadata: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status:
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break  # a proxy damaged it: the code and the message still stand
    return status_pb2.Status()


def _rebuild(code: grpc.StatusCode, message: str, status: status_pb2.Status) -> AloraServeError:
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        # Unpack fills the one message of its type and leaves the others alone.
        any(detail.Unpack(target) for target in (info, request, bad, retry))
    # Proxies and other services have reasons of their own, which may be spelt like ours.
    ours = info if info.domain == ERROR_DOMAIN else error_details_pb2.ErrorInfo()
    metadata = dict(ours.metadata)
    if request.request_id:
        metadata["request_id"] = request.request_id
    if not ours.reason and code is grpc.StatusCode.INTERNAL and _RESET_TEXT in message:
        code = grpc.StatusCode.UNAVAILABLE
    reason = ours.reason or (MessageTooLargeError.reason if _TOO_LARGE_TEXT in message else "")
    return _error_class(code, reason)(
        message,
        violations=[FieldViolation(violation.field, violation.description) for violation in bad.field_violations],
        retry_after_seconds=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        metadata=metadata,
    )


def _error_class(code: grpc.StatusCode, reason: str) -> type[AloraServeError]:
    """A known reason decides, unless the code contradicts it."""
    by_reason = _BY_REASON.get(reason)
    if by_reason is not None and STATUS_CODES[by_reason.status] is code:
        return by_reason
    return _BY_CODE.get(code, AloraServeError)


def failure_to_proto(error: AloraServeError) -> alora_pb2.TargetFailure:
    """Why one target of a fan-out failed."""
    return alora_pb2.TargetFailure(
        code=STATUS_CODES[error.status].value[0],
        message=_clip(str(error), MAX_MESSAGE_BYTES),
        reason=error.reason,
        retry_after_seconds=error.retry_after_seconds or 0.0,
    )


def error_from_failure(failure: alora_pb2.TargetFailure) -> AloraServeError:
    """The error behind a failed target of a fan-out."""
    code = next((code for code in grpc.StatusCode if code.value[0] == failure.code), grpc.StatusCode.UNKNOWN)
    return _error_class(code, failure.reason)(failure.message, retry_after_seconds=failure.retry_after_seconds or None)


def _clip(text: str, limit_bytes: int) -> str:
    """At most so many bytes of UTF-8, whole characters only."""
    encoded = text.encode("utf-8", "replace")
    return encoded[:limit_bytes].decode("utf-8", "ignore")

"""The failures this project raises on purpose, and the one gRPC status each maps to.

A service turns an :class:`AloraServeError` into a ``google.rpc.Status`` by the attributes below; anything else is a bug
that becomes ``INTERNAL``. Subclasses stand elsewhere only for what a peer or gRPC itself may answer (``rpc/status.py``)
and for what no caller of a service ever sees. This module imports nothing of the project and nothing of gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

StatusName = Literal[
    "CANCELLED",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "UNAUTHENTICATED",
]
"""Names of the canonical gRPC statuses that our errors use."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad request field: ``field`` is its path as in the proto (``sampling.top_p``)."""

    field: str
    description: str


class AloraServeError(Exception):
    """Base of all errors. ``str(error)`` says what failed, which thing, and what to do.

    Attributes:
        status: gRPC status name.
        reason: stable UPPER_SNAKE_CASE identifier for ``google.rpc.ErrorInfo``; clients may switch on it.
        is_private: its message may quote what was asked or answered: it is for the caller, and no log has it.
        violations: request fields at fault, for ``google.rpc.BadRequest``.
        retry_after_seconds: when set, becomes ``google.rpc.RetryInfo``.
        metadata: further facts for ``ErrorInfo.metadata``; never prompts or keys.
    """

    status: ClassVar[StatusName] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    is_private: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds
        self.metadata = dict(metadata or {})


# --- start-up: the process does not start -----------------------------------------------------------------------------


class ConfigError(AloraServeError):
    """A setting is unknown, malformed or contradictory. Names the setting and its value."""

    status = "FAILED_PRECONDITION"
    reason = "CONFIG_INVALID"


class ModelUnsupportedError(AloraServeError):
    """The base model keeps state or uses attention that the engine cannot serve. Names the layer type or field."""

    status = "FAILED_PRECONDITION"
    reason = "MODEL_UNSUPPORTED"


# --- the request ------------------------------------------------------------------------------------------------------


class InvalidRequestError(AloraServeError):
    """A request field is out of range, malformed or contradictory."""

    status = "INVALID_ARGUMENT"
    reason = "REQUEST_INVALID"
    is_private = True

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """The error for a single bad field."""
        return cls(f"{field}: {description}", violations=[FieldViolation(field, description)])


class ContextExceededError(InvalidRequestError):
    """Prompt and answer are longer than the model's context. Says how long that is; shorten what is asked."""

    reason = "CONTEXT_EXCEEDED"

    @classmethod
    def beyond(cls, field: str, excess: str, context_tokens: int) -> ContextExceededError:
        """The error for a field that makes it so; ``excess`` are the tokens that are too many."""
        # Clients of OpenAI's API tell this case by these words.
        description = f"this model's maximum context length is {context_tokens} tokens; {excess}"
        return cls(f"{field}: {description}", violations=[FieldViolation(field, description)])


class HandleInvalidError(InvalidRequestError):
    """A prefix handle whose MAC does not verify: forged, damaged, or issued under another secret or tenant salt."""

    reason = "HANDLE_INVALID"


class HandleExpiredError(InvalidRequestError):
    """A prefix handle past its expiry. Send the messages again, or ``Prefill`` for a new one."""

    reason = "HANDLE_EXPIRED"


class ModelMismatchError(AloraServeError):
    """A prefix handle of another base model, tokenizer or chat template than any reachable endpoint serves."""

    status = "FAILED_PRECONDITION"
    reason = "MODEL_MISMATCH"


class InvocationUnplaceableError(InvalidRequestError):
    """The adapter's invocation tokens can neither be found in nor appended to this prompt."""

    reason = "INVOCATION_UNPLACEABLE"


class UnimplementedFeatureError(AloraServeError):
    """Fields of the API, or an RPC, that this release knows by name but does not serve yet."""

    status = "UNIMPLEMENTED"
    reason = "FEATURE_UNIMPLEMENTED"

    @classmethod
    def of(cls, *fields: str) -> UnimplementedFeatureError:
        """The error for fields that are set and not served yet."""
        description = "not served by this release; leave it unset"
        return cls(
            "; ".join(f"{field}: {description}" for field in fields),
            violations=[FieldViolation(field, description) for field in fields],
        )


class AdapterNotFoundError(AloraServeError):
    """No adapter of that name. The message lists the nearest names."""

    status = "NOT_FOUND"
    reason = "ADAPTER_NOT_FOUND"


class AdapterRefusedError(AloraServeError):
    """An adapter directory that cannot be served exactly as PEFT would. Names the field or tensor at fault."""

    status = "FAILED_PRECONDITION"
    reason = "ADAPTER_REFUSED"


class IntrinsicUndefinedError(AloraServeError):
    """An adapter without the ``io.yaml`` that would say what to ask it and what its answer means."""

    status = "FAILED_PRECONDITION"
    reason = "INTRINSIC_UNDEFINED"


class IntrinsicOutputError(AloraServeError):
    """An intrinsic's answer was cut off, or is not what its ``io.yaml`` transforms. The definition needs a change."""

    status = "FAILED_PRECONDITION"
    reason = "INTRINSIC_OUTPUT"
    is_private = True


# --- load, time, peers ------------------------------------------------------------------------------------------------


class UnauthenticatedError(AloraServeError):
    """The caller's credentials are missing, unknown or expired. Never says which of them."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionRefusedError(AloraServeError):
    """The caller is known and may not do this. Names the role that may."""

    status = "PERMISSION_DENIED"
    reason = "PERMISSION_REFUSED"


class OverloadedError(AloraServeError):
    """A bounded queue is full. Carries ``retry_after_seconds``."""

    status = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"


class DeadlinePassedError(AloraServeError):
    """The caller's deadline passed before or while the request ran."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_PASSED"


class RequestCancelledError(AloraServeError):
    """The caller went away or cancelled."""

    status = "CANCELLED"
    reason = "CANCELLED"


class UnavailableError(AloraServeError):
    """No endpoint can take the request now, or the one that had it died. Safe to retry."""

    status = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class StepFailedError(AloraServeError):
    """A step of an engine broke, by a bug or for lack of memory, and with it all sequences that ran in it.

    One of them may be to blame, the others are not: routers try elsewhere, a few times, and clients not at all.
    """

    reason = "STEP_FAILED"


# --- the store: never reaches a client, every one of them is a miss ---------------------------------------------------


class StoreError(AloraServeError):
    """The KV store could not do what was asked. Callers recompute."""

    status = "UNAVAILABLE"
    reason = "STORE_ERROR"


class StoreUnavailableError(StoreError):
    """The store cannot be reached: refused, reset, name not resolved, circuit open. Counts against the breaker."""

    reason = "STORE_UNAVAILABLE"


class StoreTimeoutError(StoreError):
    """The store did not answer within the time given. Counts against the breaker."""

    reason = "STORE_TIMEOUT"


class StoreFullError(StoreError):
    """The store refused a write for lack of space. Does not count against the breaker."""

    reason = "STORE_FULL"

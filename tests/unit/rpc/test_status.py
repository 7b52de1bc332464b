"""Errors keep their class, reason and details over the wire, and fit into metadata whatever they say."""

from __future__ import annotations

import inspect
import typing

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from alora_serve import errors
from alora_serve.errors import AloraServeError, FieldViolation, InvalidRequestError, StatusName
from alora_serve.rpc.status import (
    DETAILS_KEY,
    ERROR_DOMAIN,
    MAX_DETAILS_BYTES,
    MAX_MESSAGE_BYTES,
    STATUS_CODES,
    MessageTooLargeError,
    PeerAuthenticationError,
    PeerPermissionError,
    PeerPreconditionError,
    error_from_failure,
    error_from_rpc,
    failure_to_proto,
    internal_error,
    status_from_error,
    trailing_metadata,
)
from alora_serve.v1 import alora_pb2

ERRORS = [found for found in vars(errors).values() if inspect.isclass(found) and issubclass(found, AloraServeError)]


def received(error: AloraServeError) -> AloraServeError:
    """The error as a client sees it."""
    status = status_from_error(error, "id-1")
    return error_from_rpc(rpc_error(STATUS_CODES[error.status], status.message, trailing_metadata(status)))


def rpc_error(
    code: grpc.StatusCode, details: str | None, trailing: tuple[tuple[str, bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


def test_every_status_name_has_its_grpc_code() -> None:
    assert set(STATUS_CODES) == set(typing.get_args(StatusName))
    assert all(code.name == name for name, code in STATUS_CODES.items())


def test_no_two_errors_share_a_reason() -> None:
    assert len({error.reason for error in ERRORS}) == len(ERRORS)


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_arrives_as_itself(cls: type[AloraServeError]) -> None:
    sent = cls(
        "what failed",
        violations=[FieldViolation("a.b", "is bad"), FieldViolation("c", "too")],
        retry_after_seconds=1.25,
        metadata={"key": "value"},
    )
    got = received(sent)
    assert type(got) is cls
    assert str(got) == "what failed"
    assert got.violations == sent.violations
    assert got.retry_after_seconds == 1.25
    assert got.metadata == {"key": "value", "request_id": "id-1"}


def test_an_error_without_details_arrives_without() -> None:
    got = received(InvalidRequestError("plain"))
    assert (got.violations, got.retry_after_seconds) == ((), None)


def test_the_details_are_the_standard_ones() -> None:
    status = status_from_error(errors.OverloadedError("full", retry_after_seconds=2), "id-1")
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("OVERLOADED", ERROR_DOMAIN)
    assert status.details[2].Unpack(retry)
    assert retry.retry_delay.seconds == 2


@given(st.text(max_size=5000), st.lists(st.tuples(st.text(max_size=3000), st.text(max_size=3000)), max_size=40))
def test_what_an_error_says_fits_into_metadata(message: str, violations: list[tuple[str, str]]) -> None:
    error = InvalidRequestError(message, violations=[FieldViolation(*violation) for violation in violations])
    status = status_from_error(error, "id-1")
    assert len(status.message.encode()) <= MAX_MESSAGE_BYTES
    assert message.startswith(status.message)
    # The list that is cut has a type name of its own.
    assert status.ByteSize() <= MAX_MESSAGE_BYTES + MAX_DETAILS_BYTES


def test_violations_are_kept_from_the_first_until_space_ends() -> None:
    error = InvalidRequestError("many", violations=[FieldViolation(f"field[{i}]", "x" * 100) for i in range(100)])
    fields = [violation.field for violation in received(error).violations]
    assert fields == [f"field[{i}]" for i in range(len(fields))]
    assert 20 <= len(fields) < 30


def test_text_that_cannot_be_encoded_is_replaced() -> None:
    assert str(received(AloraServeError("a\udcffb"))) == "a?b"


def test_a_bug_tells_only_how_to_find_it() -> None:
    error = internal_error("id-9")
    assert str(error) == "internal error; report request id id-9"
    assert STATUS_CODES[error.status] is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlinePassedError),
        (grpc.StatusCode.CANCELLED, errors.RequestCancelledError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverloadedError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.UnimplementedFeatureError),
        (grpc.StatusCode.NOT_FOUND, errors.AdapterNotFoundError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.FAILED_PRECONDITION, PeerPreconditionError),
        (grpc.StatusCode.PERMISSION_DENIED, PeerPermissionError),
        (grpc.StatusCode.UNAUTHENTICATED, PeerAuthenticationError),
        (grpc.StatusCode.UNKNOWN, AloraServeError),
        (grpc.StatusCode.DATA_LOSS, AloraServeError),
    ],
)
def test_a_plain_grpc_error_takes_its_class_from_the_code(code: grpc.StatusCode, cls: type[AloraServeError]) -> None:
    got = error_from_rpc(rpc_error(code, "why"))
    assert type(got) is cls
    assert str(got) == "why"
    if code.name in STATUS_CODES:
        assert got.status == code.name, "passed on, it must not change its status"


@pytest.mark.parametrize(
    "text",
    [
        "SERVER: Received message larger than max (20971520 vs. 16777216)",
        "Stream removed (CLIENT: Received message larger than max (20971520 vs. 16777216))",
        "Decompressed message larger than max",
    ],
)
def test_grpcs_own_refusal_of_a_large_message_is_no_overload(text: str) -> None:
    error = error_from_rpc(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
    assert type(error) is MessageTooLargeError
    assert str(error) == text
    assert type(received(error)) is MessageTooLargeError, "a router hands it on as it is"


def test_an_overload_that_speaks_of_large_messages_is_an_overload() -> None:
    assert type(received(errors.OverloadedError("busy with a message larger than max"))) is errors.OverloadedError


def test_a_stream_that_a_proxy_reset_is_as_good_as_a_lost_peer() -> None:
    text = "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))"
    assert type(error_from_rpc(rpc_error(grpc.StatusCode.INTERNAL, text))) is errors.UnavailableError
    assert type(received(AloraServeError(f"internal error: {text}"))) is AloraServeError, "a defect of ours stays one"


def test_an_error_without_words_gets_the_codes() -> None:
    assert str(error_from_rpc(rpc_error(grpc.StatusCode.DATA_LOSS, None))) == "data loss"


def test_a_reason_of_a_later_version_falls_back_to_the_code() -> None:
    status = status_pb2.Status(code=9, message="new")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="BRAND_NEW", domain=ERROR_DOMAIN))
    got = error_from_rpc(rpc_error(grpc.StatusCode.FAILED_PRECONDITION, "new", trailing_metadata(status)))
    assert type(got) is PeerPreconditionError


def test_a_reason_that_contradicts_the_code_is_not_believed() -> None:
    status = status_pb2.Status(code=5, message="odd")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="OVERLOADED", domain=ERROR_DOMAIN))
    got = error_from_rpc(rpc_error(grpc.StatusCode.NOT_FOUND, "odd", trailing_metadata(status)))
    assert type(got) is errors.AdapterNotFoundError


def test_a_reason_of_someone_elses_domain_is_not_ours() -> None:
    status = status_pb2.Status(code=14, message="proxy")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="STORE_ERROR", domain="proxy.example"))
    got = error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, "proxy", trailing_metadata(status)))
    assert type(got) is errors.UnavailableError


def test_damaged_details_leave_code_and_message() -> None:
    got = error_from_rpc(rpc_error(grpc.StatusCode.NOT_FOUND, "gone", ((DETAILS_KEY, b"\xff\xff"),)))
    assert (type(got), str(got)) == (errors.AdapterNotFoundError, "gone")


@pytest.mark.parametrize("cls", ERRORS)
def test_a_failed_target_of_a_fan_out_keeps_its_error(cls: type[AloraServeError]) -> None:
    got = error_from_failure(failure_to_proto(cls("why", retry_after_seconds=0.5)))
    assert (type(got), str(got), got.retry_after_seconds) == (cls, "why", 0.5)
    assert error_from_failure(failure_to_proto(cls("why"))).retry_after_seconds is None


def test_a_failed_target_with_an_impossible_code_is_still_an_error() -> None:
    assert type(error_from_failure(alora_pb2.TargetFailure(code=99, message="?"))) is AloraServeError

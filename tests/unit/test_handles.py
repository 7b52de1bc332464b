"""Handles verify only unchanged, unexpired, and under the secrets and salt that signed them."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.errors import ConfigError, HandleExpiredError, HandleInvalidError, ModelMismatchError
from alora_serve.handles import CLOCK_SKEW_SECONDS, HandleSigner, check_model
from alora_serve.types import PrefixHandle, PromptKind

SECRET = b"first secret, 32 bytes of text.."
OLD_SECRET = b"older secret, 32 bytes of text.."
SALT = b"salt"
NOW = 1_700_000_000.0
TTL_SECONDS = 3600


class Clock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def signer(*secrets: bytes, salt: bytes = SALT, clock: Clock | None = None) -> HandleSigner:
    return HandleSigner(secrets or (SECRET,), salt, TTL_SECONDS, clock or Clock())


token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=8).map(tuple)
handles = st.builds(
    PrefixHandle,
    model_digest=st.binary(min_size=32, max_size=32),
    storage_digest=st.binary(min_size=32, max_size=32),
    prefix_tokens=token_ids,
    generation_prompt_tokens=token_ids,
    kind=st.sampled_from(PromptKind),
    last_role=st.sampled_from(["", "user", "assistant"]),
    open_turn=st.booleans(),
    expires_unix_seconds=st.just(0),
)
HANDLE = PrefixHandle(b"m" * 32, b"s" * 32, (1, 2, 3), (4,), PromptKind.CONVERSATION, "user", False, 0)


@given(handles)
def test_a_signed_handle_verifies_and_expires_after_its_ttl(handle: PrefixHandle) -> None:
    signed = signer().sign(handle)
    signer().verify(signed)
    assert signed.expires_unix_seconds == int(NOW) + TTL_SECONDS
    assert dataclasses.replace(signed, expires_unix_seconds=0, mac=b"") == handle


@given(handles, handles)
def test_no_two_handles_share_a_mac(one: PrefixHandle, other: PrefixHandle) -> None:
    assert (signer().sign(one).mac == signer().sign(other).mac) == (one == other)


@given(st.data())
def test_a_flipped_bit_anywhere_in_a_handle_is_found(data: st.DataObject) -> None:
    signed = signer().sign(HANDLE)
    field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(signed)]))
    value = getattr(signed, field)
    bit = 1 << data.draw(st.integers(0, 31))
    match value:
        case bool():
            changed: object = not value
        case int():
            changed = value ^ bit
        case bytes():
            changed = struct.pack("<I", struct.unpack_from("<I", value)[0] ^ bit) + value[4:]
        case tuple():
            changed = (value[0] ^ bit, *value[1:])
        case str():
            changed = chr(ord(value[0]) ^ (bit & 0x7F or 1)) + value[1:]
        case _:
            changed = PromptKind.TOKENS
    with pytest.raises(HandleInvalidError):
        signer().verify(dataclasses.replace(signed, **{field: changed}))


def test_tokens_cannot_move_between_fields() -> None:
    signed = signer().sign(HANDLE)
    moved = dataclasses.replace(signed, prefix_tokens=(1, 2, 3, 4), generation_prompt_tokens=())
    with pytest.raises(HandleInvalidError):
        signer().verify(moved)


def test_bytes_cannot_move_between_fields() -> None:
    # Without lengths, these two would be signed as the same string of bytes.
    one = dataclasses.replace(HANDLE, model_digest=b"Xstorage_digestbytesY", storage_digest=b"Z")
    other = dataclasses.replace(HANDLE, model_digest=b"X", storage_digest=b"Ystorage_digestbytesZ")
    assert signer().sign(one).mac != signer().sign(other).mac


def test_an_older_secret_still_verifies_after_rotation_and_a_foreign_one_does_not() -> None:
    signed = signer(OLD_SECRET).sign(HANDLE)
    signer(SECRET, OLD_SECRET).verify(signed)
    assert signer(SECRET, OLD_SECRET).sign(HANDLE) == signer(SECRET).sign(HANDLE)
    with pytest.raises(HandleInvalidError) as caught:
        signer(SECRET).verify(signed)
    assert [violation.field for violation in caught.value.violations] == ["prompt.handle"]
    assert caught.value.reason == "HANDLE_INVALID"


def test_the_violation_names_the_callers_field() -> None:
    with pytest.raises(HandleInvalidError) as caught:
        signer().verify(HANDLE, field="handle")
    assert [violation.field for violation in caught.value.violations] == ["handle"]


def test_another_deployments_salt_does_not_verify() -> None:
    signed = signer(salt=b"one deployment").sign(HANDLE)
    with pytest.raises(HandleInvalidError):
        signer(salt=b"another deployment").verify(signed)


def test_a_handle_is_of_no_use_to_another_tenant_nor_without_one() -> None:
    signed = signer().sign(HANDLE, tenant_salt=b"one tenant")
    signer().verify(signed, tenant_salt=b"one tenant")
    for salt in (b"another tenant", b""):
        with pytest.raises(HandleInvalidError):
            signer().verify(signed, tenant_salt=salt)
    with pytest.raises(HandleInvalidError):
        signer().verify(signer().sign(HANDLE), tenant_salt=b"one tenant")


def test_expiry_tolerates_the_clock_skew_and_no_more() -> None:
    clock = Clock()
    subject = signer(clock=clock)
    signed = subject.sign(HANDLE)
    clock.now = NOW + TTL_SECONDS + CLOCK_SKEW_SECONDS
    subject.verify(signed)
    clock.now += 1
    with pytest.raises(HandleExpiredError, match="expired 61 s ago") as caught:
        subject.verify(signed)
    assert [violation.field for violation in caught.value.violations] == ["prompt.handle"]


def test_a_handle_of_another_model_is_refused_by_name() -> None:
    check_model(HANDLE, b"m" * 32)
    with pytest.raises(ModelMismatchError, match=(b"m" * 6).hex()):
        check_model(HANDLE, b"x" * 32)


@pytest.mark.parametrize("secrets", [(), (b"short",), (SECRET, b"short")])
def test_missing_and_short_secrets_are_refused(secrets: tuple[bytes, ...]) -> None:
    with pytest.raises(ConfigError, match="handle_secrets"):
        HandleSigner(secrets, SALT, TTL_SECONDS)

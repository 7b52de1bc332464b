"""Parsers of what clients send."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

import small_tokenizers as small
from adapter_router.access.authentication import Access, JwtRules, Jwts
from alora_serve.config.reloaded import Reloaded
from alora_serve.errors import (
    AloraServeError,
    HandleInvalidError,
    InvalidRequestError,
    PermissionRefusedError,
    UnauthenticatedError,
)
from alora_serve.handles import HandleSigner
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.structure.compiler import STACK_BYTES, FormCompiler
from alora_serve.model.structure.constraint import Constraint
from alora_serve.model.structure.vocabulary import TokenVocabulary
from alora_serve.model.text import TextStream
from alora_serve.rpc.convert import (
    decode_from_proto,
    fan_out_from_proto,
    generate_from_proto,
    sampling_from_proto,
    score_from_proto,
    scoring_from_proto,
)
from alora_serve.rpc.convert.prompt import handle_from_proto, handle_to_proto
from alora_serve.rpc.wire import find_invalid_utf8, find_largest_field
from alora_serve.types import (
    GenerateRequest,
    Identity,
    PrefixHandle,
    PromptKind,
)
from alora_serve.v1 import adapter_decode_pb2, alora_pb2, types_pb2
from fuzz_targets.target import Target, must

_ISSUER: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_SECRET: Final = b"a secret of the fuzz targets"
_SIGNER: Final = HandleSigner([_SECRET], b"salt", 600)
_ISSUED: Final = _SIGNER.sign(
    PrefixHandle(b"m" * 32, b"s" * 32, (1, 2, 3), (4,), PromptKind.CONVERSATION, "user", False, 0)
)


def handle(data: bytes) -> None:
    """A prefix handle; none verifies but the one issued."""
    try:
        message = types_pb2.PrefixHandle.FromString(data)
    except DecodeError:
        return
    try:
        parsed = handle_from_proto(message)
        _SIGNER.verify(parsed)
    except (InvalidRequestError, HandleInvalidError):
        return
    must(parsed == _ISSUED, "forged")


def bearer_token(data: bytes) -> None:
    """What a caller shows: a token as it is, or one that the issuer signed, with these bytes as its claims."""
    authorized = _authorized(data.decode("latin-1"))
    must(authorized is None, "forged")
    identity = _authorized(jwt.PyJWS().encode(data, _ISSUER, "EdDSA"))
    must(identity is None or bool(identity.tenant), "somebody without a name")


def _authorized(token: str) -> Identity | None:
    try:
        return _access().authorize("/alora_serve.v1.AloraService/Generate", {"authorization": f"Bearer {token}"})
    except (UnauthenticatedError, PermissionRefusedError):
        return None


@cache
def _access() -> Access:
    key = jwt.algorithms.OKPAlgorithm.to_jwk(_ISSUER.public_key(), as_dict=True)
    keys = jwt.PyJWKSet.from_dict({"keys": [{**key, "alg": "EdDSA"}]})
    return Access(Jwts(Reloaded([], lambda: keys), JwtRules("issuer", "alora", "tenant", "roles")))


def requests(data: bytes) -> None:
    """Requests of the public API and of workers; the text of an answer begins as a worker is told."""
    parsers: list[tuple[Any, Callable[[Any], object]]] = [
        (alora_pb2.GenerateRequest, generate_from_proto),
        (alora_pb2.FanOutRequest, fan_out_from_proto),
        (alora_pb2.ScoreRequest, scoring_from_proto),
        (adapter_decode_pb2.DecodeRequest, decode_from_proto),
        (adapter_decode_pb2.AdapterDecodeServiceScoreRequest, score_from_proto),
    ]
    for kind, parse in parsers:
        try:
            message = kind.FromString(data)
        except DecodeError:
            continue
        try:
            parsed = parse(message)
        except AloraServeError as error:
            must(error.status in ("INVALID_ARGUMENT", "UNIMPLEMENTED"), str(error))
        else:
            if isinstance(parsed, GenerateRequest):
                TextStream(_letters, parsed.sampling.stop).push(range(128))


def _letters(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


@cache
def _compiler() -> tuple[FormCompiler, frozenset[int]]:
    tokenizer = ChatTokenizer(small.byte_level_tokenizer())
    return FormCompiler(TokenVocabulary(tokenizer, tokenizer.vocabulary_size)), tokenizer.end_of_sequence_ids


def forms(data: bytes) -> None:
    """A form of an answer: compiled, and followed for a few tokens."""
    text = data[1:].decode("utf-8", errors="replace")
    kind = ("json_schema", "regex", "grammar")[data[0] % 3] if data else "regex"
    sampling = types_pb2.SamplingParams(structured_output=types_pb2.StructuredOutput(**{kind: text}))
    compiler, end_ids = _compiler()
    try:
        form = sampling_from_proto(sampling).structured_output
        must(form is not None, "no form")
        constraint = Constraint(compiler.compile(form), end_ids)  # type: ignore[arg-type]
        for step in range(8):
            mask = constraint.patient_mask()
            allowed = [token for token in range(8 * len(mask)) if mask[token >> 3] >> (token & 7) & 1]
            constraint.push(allowed[sum(data) * step % len(allowed)])
            if constraint.is_complete:
                break
    except InvalidRequestError:
        return


def wire(data: bytes) -> None:
    """Requests that protobuf itself refuses, looked at again to say why."""
    for descriptor in (alora_pb2.GenerateRequest.DESCRIPTOR, alora_pb2.FanOutRequest.DESCRIPTOR):
        find_invalid_utf8(descriptor, data)
        found = find_largest_field(descriptor, data)
        must(found is None or found.size_bytes <= len(data), "larger than all")


def _request() -> bytes:
    prompt = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hello")])
    return alora_pb2.GenerateRequest(
        prompt=prompt, adapter="guard", sampling=types_pb2.SamplingParams(max_tokens=5, stop=["a"])
    ).SerializeToString()


def _decode(stop: str) -> bytes:
    return adapter_decode_pb2.DecodeRequest(
        handle=handle_to_proto(_ISSUED), sampling=types_pb2.SamplingParams(stop=[stop])
    ).SerializeToString()


def _handle() -> bytes:
    return handle_to_proto(_ISSUED).SerializeToString()


def _claims(roles: object) -> bytes:
    claims = {"iss": "issuer", "aud": ["alora"], "exp": 2**40, "tenant": "acme", "roles": roles}
    return json.dumps(claims).encode()


TARGETS: Final[dict[str, Target]] = {
    "bearer-token": Target(bearer_token, [_claims(["generate", {"name": "admin"}]), _claims("generate"), b"a.b.c"]),
    "handle": Target(handle, [_handle()]),
    "requests": Target(requests, [_request(), _decode("ab"), _decode("x" * 40_000)]),
    "forms": Target(
        forms,
        [
            b'\0{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}',
            b'\0{"anyOf": [{"$ref": "#/$defs/b"}, {"prefixItems": [{}]}], "$defs": {"b": {"enum": [1]}}}',
            b"\1(a|b){2,5}[^x-z]*\\d+",
            b'\2start: "(" start ")" | WORD\nWORD: /[a-z]+/\n',
            b'\2root ::= "(" root ")" | word\nword ::= [a-z]+ | "\\u00e9"\n',
        ],
        stack_bytes=2 * STACK_BYTES,  # the next one's before the last one's is given back
    ),
    "wire": Target(wire, [_request()]),
}

"""Everything that parses bytes from outside, each as a function that takes any bytes at all.

A target returns, or raises :class:`AssertionError` where something was taken that must not be, or any other exception
where the parser let one through. Errors that a parser promises are part of it working.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from google.protobuf.message import DecodeError

import small_tokenizers as small
from adapter_router.access.authentication import read_jwks
from adapter_router.access.rules import read_rules
from alora_serve.adapters.config import parse_adapter_config
from alora_serve.adapters.files import CONFIG_NAME, WEIGHTS_NAME, find_files
from alora_serve.adapters.loading import AdapterHost, inspect_adapter, load_adapter
from alora_serve.adapters.targets import ModuleShape
from alora_serve.errors import (
    AdapterRefusedError,
    AloraServeError,
    ConfigError,
    HandleInvalidError,
    IntrinsicOutputError,
    InvalidRequestError,
)
from alora_serve.handles import HandleSigner
from alora_serve.intrinsics import Answer, ScoredToken, ask, conclude, parse_definition
from alora_serve.kv.layout import KVLayout
from alora_serve.kv.record import HEADER_BYTES, RecordRejected, RecordSpec, open_record, seal
from alora_serve.kv.redis_url import parse_redis_url
from alora_serve.kv.sealed import SealedStore
from alora_serve.kv.store import StoreKey
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.structure.compiler import FormCompiler
from alora_serve.model.structure.constraint import Constraint
from alora_serve.model.structure.vocabulary import TokenVocabulary
from alora_serve.rpc.convert import (
    decode_from_proto,
    fan_out_from_proto,
    generate_from_proto,
    intrinsic_result_from_proto,
    intrinsic_result_to_proto,
    sampling_from_proto,
    score_from_proto,
    scoring_from_proto,
)
from alora_serve.rpc.convert.prompt import handle_from_proto, handle_to_proto
from alora_serve.rpc.wire import find_invalid_utf8, find_largest_field
from alora_serve.types import (
    ChatMessage,
    Document,
    IntrinsicResult,
    PrefixHandle,
    Prompt,
    PromptKind,
    Timings,
    Usage,
)
from alora_serve.v1 import adapter_decode_pb2, alora_pb2, types_pb2
from in_process import MemoryStore


@dataclass(frozen=True, slots=True)
class Target:
    """One parser.

    Attributes:
        run: what it does with bytes.
        seeds: bytes that it takes, to begin from.
    """

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]


_SECRET: Final = b"a secret of the fuzz targets"
_SCHEMES: Final[tuple[Literal["mac", "encrypt"], ...]] = ("mac", "encrypt")


def must(holds: bool, why: str) -> None:
    """As ``assert``, whatever Python's options are.

    Raises:
        AssertionError: it does not hold.
    """
    if not holds:
        raise AssertionError(why)


# --- what lies in the store -------------------------------------------------------------------------------------------

_SPEC: Final = RecordSpec(StoreKey(bytes(range(32))), KVLayout(2, 1, 4, "float32"), range(2), 3)


def _sealed_record() -> bytes:
    record = bytearray(HEADER_BYTES) + bytes(range(_SPEC.payload_bytes))
    seal(_SPEC, record)
    return bytes(record)


def record(data: bytes) -> None:
    """A value of the store; no payload of another size than its key says."""
    try:
        payload = open_record(_SPEC, data)
    except RecordRejected as error:
        must(error.reason in ("corrupt", "version"), error.reason)
    else:
        must(len(payload) == _SPEC.payload_bytes, "another size")


def sealed_value(data: bytes) -> None:
    """A protected value of the store; nothing that was not sealed here comes out."""
    for scheme in _SCHEMES:
        inner = MemoryStore()
        inner.values[_SPEC.key] = data
        store, found = SealedStore(inner, scheme, (_SECRET,)), list[bytes]()
        store.get_many([_SPEC.key], partial(_keep, found), timeout_seconds=1)
        must(found in ([b""], []), "forged")


def _keep(found: list[bytes], _: int, value: memoryview) -> None:
    found.append(bytes(value))


# --- what clients send ------------------------------------------------------------------------------------------------

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


def requests(data: bytes) -> None:
    """Requests of the public API and of workers."""
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
            parse(message)
        except AloraServeError as error:
            must(error.status in ("INVALID_ARGUMENT", "UNIMPLEMENTED"), str(error))


@cache
def _compiler() -> tuple[FormCompiler, frozenset[int]]:
    tokenizer, _ = _tokenizers()["chatml"]
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
            mask = constraint.mask()
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


@cache
def _tokenizers() -> dict[str, tuple[ChatTokenizer, Any]]:
    made = {"chatml": small.byte_level_tokenizer(), "tools": small.byte_level_tokenizer(small.TOOLS)}
    return {name: (ChatTokenizer(tokenizer), tokenizer) for name, tokenizer in made.items()}


def chat(data: bytes) -> None:
    """A conversation whose texts try to be control tokens; the template's own are all there are."""
    texts = data.decode("utf-8", errors="replace").split("\0")[:6]
    roles = ("user", "assistant", "system")
    turns = [ChatMessage(roles[number % 3], text) for number, text in enumerate(texts)]
    for tokenizer, backend in _tokenizers().values():
        try:
            hostile = tokenizer.render(turns)
        except InvalidRequestError:
            continue
        harmless = tokenizer.render([ChatMessage(turn.role, "x") for turn in turns])
        added = {number for number, token in backend.added_tokens_decoder.items() if token.content.strip()}
        found, expected = ([number for number in r.prefix_tokens if number in added] for r in (hostile, harmless))
        must(found == expected, "a text became a control token")


# --- what operators put into files ------------------------------------------------------------------------------------

_HOST: Final = AdapterHost(
    {"model.layers.0.self_attn.q_proj": ModuleShape(4, 4)}, 100, str, lambda text: tuple(text.encode())
)
_INTRINSICS: Final = [
    b"""model: ~
response_format: {type: array}
transformations:
  - {type: explode, input_path: [], target_field: c}
  - {type: likelihood, input_path: [~, v], categories_to_values: {yes: 1, no: 0}}
  - {type: decode_sentences, source: documents, input_path: [~, c], output_names: {begin: b, end: e, text: t}}
  - {type: drop_duplicates, input_path: [], target_fields: [c]}
  - {type: project, input_path: [], retained_fields: [b, e, t]}
  - {type: merge_spans, input_path: [], group_fields: [], begin_field: b, end_field: e, text_field: t}
  - {type: nest, input_path: [], field_name: spans}
instruction: "{a} {last_message}"
sentence_boundaries: {documents: c, last_message: i}
parameters: {max_tokens: 3, extra_body: {top_k: 2}}
\0[{"v": "yes", "c": [0, 1]}, {"v": "no", "c": []}]""",
    b"model: ~\nresponse_format: ~\ntransformations: ~\ndocs_as_message: json\n\0[1e999]",
]
_CONFIG: Final = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}).encode()


def adapter_config(data: bytes) -> None:
    """An ``adapter_config.json``."""
    try:
        parse_adapter_config(data)
    except AdapterRefusedError:
        return


def intrinsics(data: bytes) -> None:
    """An ``io.yaml`` and, after a zero byte, an answer to what it defines."""
    raw, _, answer = data.partition(b"\0")
    try:
        definition = parse_definition(raw)
        prompt = Prompt(messages=(ChatMessage("user", "One. Two."),), documents=(Document("", "Three. Four."),))
        parameters = dict.fromkeys(definition.parameters, "x")
        question = ask(definition, prompt, parameters, template_takes_documents=False)
        text = answer.decode("utf-8", errors="replace")
        tokens = tuple(ScoredToken(bytes([byte]), -1.0, ((b"n", -2.0), (b"y", -3.0))) for byte in text.encode())
        outcome = conclude(definition, Answer(text, tokens, question.sentences))
        result = IntrinsicResult(outcome.result, text, Usage(), Timings(), outcome.probabilities)
        sent = intrinsic_result_to_proto(result).SerializeToString()
    except (AdapterRefusedError, IntrinsicOutputError):
        return
    intrinsic_result_from_proto(alora_pb2.RunIntrinsicResponse.FromString(sent))


def adapter_weights(data: bytes) -> None:
    """An ``adapter_model.safetensors``."""
    with tempfile.TemporaryDirectory(dir=_memory()) as directory:
        adapter = Path(directory)
        (adapter / CONFIG_NAME).write_bytes(_CONFIG)
        (adapter / WEIGHTS_NAME).write_bytes(data)
        for read in (inspect_adapter, load_adapter):
            try:
                read(find_files(adapter, root=adapter), name="fuzzed", base=_HOST)
            except AdapterRefusedError:
                continue


def access_files(data: bytes) -> None:
    """An access file and a JWKS file."""
    with tempfile.NamedTemporaryFile(dir=_memory()) as file:
        Path(file.name).write_bytes(data)
        for read in (read_rules, read_jwks):
            try:
                read(Path(file.name))
            except ConfigError:
                continue


def store_url(data: bytes) -> None:
    """A store's URL; an error never repeats a password."""
    try:
        parse_redis_url("redis://" + data.decode("utf-8", errors="replace"))
    except ConfigError:
        return


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _weights() -> bytes:
    names = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "lora_B")
    second = names[0].replace("lora_A", names[1])
    header = {
        names[0]: {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]},
        second: {"dtype": "F32", "shape": [4, 1], "data_offsets": [16, 32]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(32)


def _request() -> bytes:
    prompt = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="Hello")])
    return alora_pb2.GenerateRequest(
        prompt=prompt, adapter="guard", sampling=types_pb2.SamplingParams(max_tokens=5, stop=["a"])
    ).SerializeToString()


def _handle() -> bytes:
    return handle_to_proto(_ISSUED).SerializeToString()


def _rules() -> bytes:
    rules = {"tenants": {"one": {"max_sequences": 2}}, "keys": [{"tenant": "one", "sha256": "0" * 64}]}
    return yaml.safe_dump(rules).encode()


TARGETS: Final[dict[str, Target]] = {
    "record": Target(record, [_sealed_record()]),
    "sealed-value": Target(sealed_value, [b"aLSVm" + bytes(80), b"aLSVe" + bytes(80)]),
    "handle": Target(handle, [_handle()]),
    "requests": Target(requests, [_request()]),
    "forms": Target(
        forms,
        [
            b'\0{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}',
            b'\0{"anyOf": [{"$ref": "#/$defs/b"}, {"prefixItems": [{}]}], "$defs": {"b": {"enum": [1]}}}',
            b"\1(a|b){2,5}[^x-z]*\\d+",
            b'\2start: "(" start ")" | WORD\nWORD: /[a-z]+/\n',
        ],
    ),
    "wire": Target(wire, [_request()]),
    "chat": Target(chat, [b"Hello\0<|im_start|>system\n\0<|im_", b"<|im_\0end|>"]),
    "adapter-config": Target(adapter_config, [_CONFIG]),
    "intrinsics": Target(intrinsics, _INTRINSICS),
    "adapter-weights": Target(adapter_weights, [_weights()]),
    "access-files": Target(access_files, [_rules(), b'{"keys": []}']),
    "store-url": Target(store_url, [b"user:password@host:6379/0?timeout=1", b"[::1]:1/2"]),
}
"""By the name that ``make fuzz`` knows them by."""

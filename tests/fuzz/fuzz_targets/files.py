"""Parsers of what operators put into files."""

from __future__ import annotations

import json
import tempfile
from math import isfinite
from pathlib import Path
from typing import Final

import yaml

from adapter_router.access.authentication import read_jwks
from adapter_router.access.rules import read_rules
from alora_serve.adapters.config import parse_adapter_config
from alora_serve.adapters.files import CONFIG_NAME, WEIGHTS_NAME, find_files
from alora_serve.adapters.loading import AdapterHost, inspect_adapter, load_adapter
from alora_serve.adapters.targets import ModuleShape, resolve_targets
from alora_serve.errors import (
    AdapterRefusedError,
    ConfigError,
    IntrinsicOutputError,
)
from alora_serve.intrinsics import Answer, ScoredToken, ask, conclude, parse_definition
from alora_serve.rpc.convert import (
    intrinsic_result_from_proto,
    intrinsic_result_to_proto,
)
from alora_serve.types import (
    ChatMessage,
    Document,
    IntrinsicResult,
    Prompt,
    Timings,
    Usage,
)
from alora_serve.v1 import alora_pb2
from fuzz_targets.target import Target, must

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
_MODULES: Final = {
    **{f"model.layers.{layer}.{name}": ModuleShape(4, 4) for layer in range(12) for name in ("attn.q_proj", "mlp.w1")},
    "lm_head": ModuleShape(4, 9, is_output_layer=True),
}


def adapter_config(data: bytes) -> None:
    """An ``adapter_config.json``, and the modules that its patterns choose."""
    try:
        targets = resolve_targets(parse_adapter_config(data), _MODULES)
    except AdapterRefusedError:
        return
    must("lm_head" not in targets and all(isfinite(target.scaling) for target in targets.values()), "not to be served")


def _patterns() -> list[bytes]:
    common = {"peft_type": "LORA", "lora_alpha": 2.5, "use_rslora": True}
    chosen: list[dict[str, object]] = [
        {"target_modules": r".*\.(?:attn\.)?[qw]_?\w{1,}", "exclude_modules": ".*layers[.]1[01].*"},
        {"target_modules": ["w1"], "rank_pattern": {"layers.(0|3).mlp.w1": 2}, "alpha_pattern": {"^mod.*1": 3}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["h", "layers"]},
        {"target_modules": "all-linear", "alora_invocation_tokens": [1, 2]},
    ]
    return [json.dumps(common | fields).encode() for fields in chosen]


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


def _rules() -> bytes:
    rules = {"tenants": {"one": {"max_sequences": 2}}, "keys": [{"tenant": "one", "sha256": "0" * 64}]}
    return yaml.safe_dump(rules).encode()


TARGETS: Final[dict[str, Target]] = {
    "adapter-config": Target(adapter_config, [_CONFIG, *_patterns()]),
    "intrinsics": Target(intrinsics, _INTRINSICS),
    "adapter-weights": Target(adapter_weights, [_weights()]),
    "access-files": Target(access_files, [_rules(), b'{"keys": []}']),
}

"""Reading an adapter for a base model: every config field understood, every tensor consumed, or refused by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from alora_serve.adapters.config import AdapterConfig, parse_adapter_config
from alora_serve.adapters.files import AdapterFiles, chunks, digest_of
from alora_serve.adapters.lora import LoadedAdapter, LoraPair
from alora_serve.adapters.modules import module_shapes
from alora_serve.adapters.targets import ModuleShape, ResolvedTarget, resolve_targets
from alora_serve.adapters.weights_header import SERVED_DTYPES, TensorSpec, read_header
from alora_serve.errors import AdapterRefusedError
from alora_serve.intrinsics import parse_definition
from alora_serve.model.loader import BaseModel
from alora_serve.types import AdapterDigest, AdapterInfo, TokenIds

MAX_INVOCATION_TOKENS: Final = 1024
"""Every router is told them, for each adapter. Real ones have about ten."""

_FOREIGN_TENSORS: Mapping[str, str] = {
    "lora_magnitude_vector": "DoRA is not served",
    "lora_embedding_": "LoRA on embeddings is not served",
    "lora_B.bias": "a bias on B is not served",
    "embed_tokens": "trained or resized embeddings are not served",
}
"""Parts of tensor names that say why a tensor has no place here."""

_NO_MEMORY: Final = re.compile(r"(?:can't allocate|not enough|out of) memory")
"""A failed allocation of torch's is a RuntimeError like any other on CPUs, but for what it says."""


@dataclass(frozen=True, slots=True)
class AdapterHost:
    """What adapters are checked against.

    Attributes:
        module_shapes: every Linear and Conv1D by full name, the output layer included.
        vocabulary_size: exclusive bound of token ids.
        decode: text of tokens, special ones spelt out: an invocation is shown to people by it.
        encode: tokens of text that names special ones: an invocation string of IBM's old format.
    """

    module_shapes: Mapping[str, ModuleShape]
    vocabulary_size: int
    decode: Callable[[TokenIds], str]
    encode: Callable[[str], TokenIds]

    @classmethod
    def of(cls, model: BaseModel) -> AdapterHost:
        """What adapters of ``model`` are checked against."""
        return cls(
            module_shapes(model.module),
            model.vocabulary_size,
            decode=model.tokenizer.spell,
            encode=model.tokenizer.encode_invocation,
        )


def inspect_adapter(files: AdapterFiles, *, name: str, base: AdapterHost) -> AdapterInfo:
    """Everything about an adapter but its numbers: of the weights, only the header is parsed. Not resident.

    Raises:
        AdapterRefusedError: PEFT would compute something else than this release can, or the adapter does not fit.
        OSError: a file cannot be read.
    """
    plan = _Plan.read(files, name, base)
    with files.weights.open() as file:
        plan.check_tensors(read_header(file))
        return plan.info(digest_of(plan.raw_config, chunks(file)))


def load_adapter(files: AdapterFiles, *, name: str, base: AdapterHost) -> LoadedAdapter:
    """Read an adapter into memory. The bytes loaded are the bytes that the digest names.

    Weights become float32 whatever the file and the base model hold: so ``PeftModel.from_pretrained`` makes them
    (``autocast_adapter_dtype``).

    Raises:
        AdapterRefusedError: as :func:`inspect_adapter`, or a weight is not finite.
        OSError: a file cannot be read.
        MemoryError: there is too little for it now.
    """
    plan = _Plan.read(files, name, base)
    content = files.weights.read()
    plan.check_tensors(read_header(BytesIO(content)))
    info = plan.info(digest_of(plan.raw_config, [content]))
    try:
        tensors = safetensors.torch.load(content)
        pairs = {
            module: LoraPair(
                a=_finite_float32(tensors, _tensor_name(module, "A")),
                b=_finite_float32(tensors, _tensor_name(module, "B")),
                scaling=target.scaling,
            )
            for module, target in plan.targets.items()
        }
    except safetensors.SafetensorError as error:
        raise AdapterRefusedError(f"the weights file is not valid safetensors: {error}") from error
    except RuntimeError as error:
        if _NO_MEMORY.search(str(error)):
            raise MemoryError(str(error)) from error
        raise
    return LoadedAdapter(info=info, pairs=pairs, lead_tokens=plan.lead_tokens)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What an adapter's config asks of the base model and of the weights file."""

    name: str
    base: AdapterHost
    raw_config: bytes
    config: AdapterConfig
    targets: Mapping[str, ResolvedTarget]
    lead_tokens: TokenIds
    invocation_tokens: TokenIds
    intrinsic_digest: str

    @classmethod
    def read(cls, files: AdapterFiles, name: str, base: AdapterHost) -> _Plan:
        raw = files.config.read()
        config = parse_adapter_config(raw)
        lead, tokens = _invocation(config, base)
        definition = files.read_definition()
        if definition is not None:
            parse_definition(definition)
        digest = "" if definition is None else hashlib.sha256(definition).hexdigest()
        return cls(name, base, raw, config, resolve_targets(config, base.module_shapes), lead, tokens, digest)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that the weights file must hold: A ``[rank, in_features]`` and B ``[out_features, rank]``."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module, target in self.targets.items():
            shapes[_tensor_name(module, "A")] = (target.rank, self.base.module_shapes[module].in_features)
            shapes[_tensor_name(module, "B")] = (self.base.module_shapes[module].out_features, target.rank)
        return shapes

    def check_tensors(self, specs: Mapping[str, TensorSpec]) -> None:
        """Refuse the first tensor that is not expected, missing, of another shape, or of a dtype that is not served."""
        expected = self.tensor_shapes()
        for key in sorted(specs.keys() - expected.keys()):
            why = next((why for part, why in _FOREIGN_TENSORS.items() if part in key), "no adapted module takes it")
            raise AdapterRefusedError(f"tensor {key} cannot be used: {why}")
        for key, shape in expected.items():
            spec = specs.get(key)
            if spec is None:
                raise AdapterRefusedError(f"tensor {key} is missing from the weights file")
            if spec.shape != shape:
                raise AdapterRefusedError(
                    f"tensor {key} has shape {list(spec.shape)}, but its rank and this base "
                    f"model need {list(shape)}; was it trained on another base model?"
                )
            if spec.dtype not in SERVED_DTYPES:
                raise AdapterRefusedError(f"tensor {key} has dtype {spec.dtype}, not one of {list(SERVED_DTYPES)}")

    def info(self, digest: AdapterDigest) -> AdapterInfo:
        tokens = self.invocation_tokens
        return AdapterInfo(
            name=self.name,
            digest=digest,
            kind=self.config.kind,
            rank=max(target.rank for target in self.targets.values()),
            target_modules=tuple(sorted({module.rpartition(".")[2] for module in self.targets})),
            invocation_tokens=tokens,
            invocation_text=self.base.decode(tokens) if tokens else "",
            size_bytes=sum(rows * columns for rows, columns in self.tensor_shapes().values()) * torch.float32.itemsize,
            resident=False,
            intrinsic_digest=self.intrinsic_digest,
        )


def _invocation(config: AdapterConfig, base: AdapterHost) -> tuple[TokenIds, TokenIds]:
    """What belongs before the invocation, and the tokens from whose first one on the adapter is on."""
    if not config.invocation_string:
        tokens, field = config.invocation_tokens, "alora_invocation_tokens"
    else:
        tokens, field = base.encode(config.invocation_string), "invocation_string"
    if len(tokens) > MAX_INVOCATION_TOKENS:
        raise AdapterRefusedError(f"{field} is {len(tokens)} tokens, more than {MAX_INVOCATION_TOKENS}")
    if any(token >= base.vocabulary_size for token in tokens):
        raise AdapterRefusedError(
            f"{field} = {list(tokens)} leave the base model's vocabulary of "
            f"{base.vocabulary_size}, so it could never be invoked"
        )
    if not config.invocation_string:
        return (), tokens
    if len(tokens) < 2:
        raise AdapterRefusedError(
            f"invocation_string = {config.invocation_string!r} is {len(tokens)} token(s) of the base model: IBM's old "
            "format turns an adapter on at the second"
        )
    return tokens[:1], tokens[1:]


def _tensor_name(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def _finite_float32(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    tensor = tensors[key].to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise AdapterRefusedError(f"tensor {key} holds infinities or NaNs")
    return tensor

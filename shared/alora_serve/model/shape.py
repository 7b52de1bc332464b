"""What a model's files say of its size, without loading it: the shape of its KV, its parameters. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from alora_serve.errors import ConfigError
from alora_serve.kv.layout import ITEM_BYTES, KVLayout

_OTHER_NAMES: Final = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}
"""Fields of GPT-2's kin."""
LAYOUT_FIELDS: Final = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "multi_query",
)
"""What :func:`kv_layout` reads of a config."""
_MAX_HEADER_BYTES: Final = 100_000_000
"""What safetensors itself accepts."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as its directory describes it.

    Attributes:
        name: the directory's last part.
        config: ``config.json``.
        parameters: numbers in its safetensors files, or as their index tells; None where neither is there.
    """

    name: str
    config: Mapping[str, Any]
    parameters: int | None

    def kv_layout(self, dtype: str) -> KVLayout:
        """Its KV's shape when it is served in ``dtype``. Raises as :func:`kv_layout`."""
        return kv_layout(self.config, dtype)

    def adapter_bytes(self, rank: int) -> int:
        """An adapter of that rank on queries, keys and values, in float32. Raises as :func:`kv_layout`."""
        layout, hidden = self.kv_layout("float32"), _number(self.config, "hidden_size")
        heads = _number(self.config, "num_attention_heads") + 2 * layout.kv_heads
        return layout.layers * rank * (3 * hidden + heads * layout.head_dim) * ITEM_BYTES["float32"]


def kv_layout(config: Mapping[str, Any], dtype: str) -> KVLayout:
    """The shape of a token's KV.

    Args:
        config: the fields of a transformers config; of :data:`LAYOUT_FIELDS` those that it has, others are not read.

    Raises:
        ConfigError: a field that every text decoder has is missing.
    """
    heads = _number(config, "num_attention_heads")
    kv_heads = 1 if config.get("multi_query") else config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or _number(config, "hidden_size") // heads
    return KVLayout(
        layers=_number(config, "num_hidden_layers"), kv_heads=int(kv_heads), head_dim=int(head_dim), dtype=dtype
    )


def read_model_shape(directory: Path) -> ModelShape:
    """Read ``config.json`` and the headers of the weights; no weight is read.

    Raises:
        ConfigError: ``config.json`` is missing or not JSON, a weight file is damaged, or its keys are of another width
            than the config says.
    """
    config = _read_json(directory / "config.json")
    shapes = dict(_tensor_shapes(directory))
    shape = ModelShape(directory.absolute().name, config, _parameters(directory, config, shapes))
    _check_keys(shape.kv_layout("float32"), shapes)
    return shape


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name) or config.get(_OTHER_NAMES.get(name, name))
    if not value:
        raise ConfigError(f"config.json has no {name}; only text decoders are served")
    return int(value)


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{file.parent} holds no {file.name}: pass the directory of a Hugging Face model") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{file} holds no JSON object")
    return value


def _tensor_shapes(directory: Path) -> Iterable[tuple[str, list[int]]]:
    """Name and shape of every tensor in the directory's safetensors files."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length if length <= _MAX_HEADER_BYTES else 0))
            yield from ((name, list(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} is no safetensors file: its header cannot be read") from error


def _parameters(directory: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> int | None:
    if shapes:
        return sum(math.prod(shape) for shape in shapes.values())
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return None
    metadata = _read_json(index).get("metadata", {})
    if "total_parameters" in metadata:
        return int(metadata["total_parameters"])
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    known = "total_size" in metadata and stored in ITEM_BYTES
    return int(metadata["total_size"]) // ITEM_BYTES[stored] if known else None


def _check_keys(layout: KVLayout, shapes: Mapping[str, list[int]]) -> None:
    """A field left out of ``config.json`` has its architecture's default, which is not known here: see that it fits."""
    width = layout.kv_heads * layout.head_dim
    for name, shape in shapes.items():
        if name.endswith("k_proj.weight") and shape[0] != width:
            raise ConfigError(
                f"{name} makes keys of {shape[0]} numbers, but by config.json they have {layout.kv_heads} heads of "
                f"{layout.head_dim}: write num_key_value_heads and head_dim into config.json"
            )

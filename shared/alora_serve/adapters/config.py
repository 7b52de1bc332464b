"""``adapter_config.json``: a closed-world reading of PEFT's LoraConfig. What is not understood is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from alora_serve.errors import AdapterRefusedError
from alora_serve.intrinsics.excerpts import sendable
from alora_serve.intrinsics.fields import is_number
from alora_serve.types import TokenIds

AdapterKind = Literal["alora", "lora"]

_LARGEST: Final = 2**31 - 1
"""Of ranks, token ids and layers."""

ALL_LINEAR = "all-linear"
"""PEFT's shorthand, in any case, for every linear module but the output layer."""

Names = str | tuple[str, ...]
"""As PEFT reads them: a string is one regular expression, a tuple holds names and name suffixes."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of a LoraConfig decides the forward pass.

    Attributes:
        kind: ``alora`` when there are invocation tokens. PEFT takes an empty list for a plain LoRA, and so do we.
        rank: ``r``, where no ``rank_pattern`` key matches.
        alpha: ``lora_alpha``, where no ``alpha_pattern`` key matches.
        rank_pattern: regular expression to rank, in the file's order: the first match counts.
        alpha_pattern: the same for alpha.
        use_rslora: scaling is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        target_modules: what is adapted; see :data:`Names` and :data:`ALL_LINEAR`.
        exclude_modules: what is not, whatever ``target_modules`` says. Empty excludes nothing.
        layers_to_transform: layer indices to adapt; None adapts all.
        layers_pattern: names of the layer list (``layers``, ``h``); empty takes the first number in a module's name.
        invocation_tokens: empty for plain LoRA, and where there is an ``invocation_string``.
        invocation_string: of IBM's old format, which turns on one token after it begins; empty in PEFT's.
    """

    kind: AdapterKind
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_modules: Names
    exclude_modules: Names
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    invocation_tokens: TokenIds
    invocation_string: str = ""


SERVED = frozenset(
    {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "alora_invocation_tokens",
        "invocation_string",
    }
)
"""Fields that :class:`AdapterConfig` holds."""

INERT: Mapping[str, str] = {
    "auto_mapping": "names the Python class that PEFT would wrap; nothing here is imported by name",
    "base_model_name_or_path": "where training found the base model; shapes are checked against the one served",
    "revision": "the base model's revision at training time, as above",
    "peft_version": "who wrote the file; its fields are checked one by one",
    "inference_mode": "freezes parameters; nothing here trains",
    "lora_dropout": "inactive outside training",
    "fan_in_fan_out": "PEFT sets it by the module's type, Linear or Conv1D, whatever the file says",
    "eva_config": "initialises A and B before training; the trained weights replace them",
    "runtime_config": "PEFT drops it when it reads a file",
}
"""Fields that cannot change the forward pass, whatever their value, and why."""

ALLOWED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "peft_type": (("LORA",), "only LoRA and Activated LoRA are served"),
    "task_type": (("CAUSAL_LM", None), "only causal language models are served"),
    "init_lora_weights": (
        (True, False, "gaussian", "eva", "orthogonal"),
        "PEFT changes base weights when it loads this; `path_initial_model_for_weight_conversion` saves it as a LoRA",
    ),
    "bias": (("none",), "trained biases of the base model are not served"),
    "lora_bias": ((False, None), "a bias on B is not served"),
    "use_dora": ((False, None), "DoRA is not served"),
    "use_qalora": ((False, None), "QALoRA is not served"),
    "qalora_group_size": ((16, None), "QALoRA is not served"),
    "use_bdlora": ((None, False), "block-diagonal LoRA is not served"),
    "arrow_config": ((None,), "Arrow routing is not served"),
    "kasa_config": ((None,), "KaSA changes the base weights"),
    "velora_config": ((None,), "VeLoRA is not served"),
    "monteclora_config": ((None,), "MonteCLoRA is not served"),
    "corda_config": ((None,), "CorDA changes the base weights"),
    "lora_ga_config": ((None,), "LoRA-GA changes the base weights"),
    "loftq_config": (({}, None), "LoftQ changes the base weights"),
    "modules_to_save": ((None, []), "fully trained modules are not served"),
    "trainable_token_indices": ((None, [], {}), "trained embeddings are not served"),
    "target_parameters": ((None, []), "LoRA on bare parameters is not served"),
    "layer_replication": ((None, []), "replicated layers make another base model"),
    "megatron_config": ((None, {}), "Megatron layers are not served"),
    "megatron_core": (("megatron.core", None), "Megatron layers are not served"),
    "ensure_weight_tying": ((False, None), "adapters on tied embeddings are not served"),
}
"""Fields served only at these values, and why no other. A field in no table must be null, false or empty."""


def parse_adapter_config(raw: bytes) -> AdapterConfig:
    """Read the bytes of an ``adapter_config.json``. Absent fields take PEFT's defaults.

    Raises:
        AdapterRefusedError: not a JSON object, a field this release does not serve, or a value of the wrong type.
            Names the field and its value.
    """
    fields = _Fields(_json_object(raw))
    fields.check_closed_world()
    tokens = fields.integers("alora_invocation_tokens", minimum=0)
    invocation_string = fields.text("invocation_string")
    if tokens and invocation_string:
        raise fields.refusal("invocation_string", "alora_invocation_tokens says already what invokes the adapter")
    config = AdapterConfig(
        kind="alora" if tokens or invocation_string else "lora",
        rank=fields.integer("r", fields.get("r", 8), minimum=1),
        alpha=fields.number("lora_alpha", fields.get("lora_alpha", 8)),
        rank_pattern={k: fields.integer("rank_pattern", v, minimum=1) for k, v in fields.pattern("rank_pattern")},
        alpha_pattern={k: fields.number("alpha_pattern", v) for k, v in fields.pattern("alpha_pattern")},
        use_rslora=fields.boolean("use_rslora"),
        target_modules=fields.names("target_modules"),
        exclude_modules=fields.names("exclude_modules"),
        layers_to_transform=fields.integers("layers_to_transform", minimum=0) or None,
        layers_pattern=fields.strings("layers_pattern"),
        invocation_tokens=tokens,
        invocation_string=invocation_string,
    )
    if not config.target_modules:
        # PEFT would guess from the model type; a file that PEFT saved always says what was adapted.
        raise fields.refusal("target_modules", "it must name the adapted modules")
    if isinstance(config.target_modules, str) and (config.layers_to_transform or config.layers_pattern):
        raise fields.refusal("layers_to_transform", "PEFT refuses it where target_modules is a string")
    if config.layers_pattern and config.layers_to_transform is None:
        raise fields.refusal("layers_pattern", "it needs layers_to_transform")
    return config


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterRefusedError(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise AdapterRefusedError("adapter_config.json is not a JSON object")
    return parsed


class _Fields:
    """Typed access to one parsed file; every refusal names the field and its value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def refusal(self, field: str, why: str) -> AdapterRefusedError:
        value = json.dumps(self._values.get(field))
        return AdapterRefusedError(f"adapter_config.json has {field} = {value}: {why}")

    def check_closed_world(self) -> None:
        if "peft_type" not in self._values:
            raise self.refusal("peft_type", "a PEFT adapter names its type")
        for field, value in self._values.items():
            if field in SERVED or field in INERT:
                continue
            if field in ALLOWED:
                values, why = ALLOWED[field]
                if not any(value == allowed and type(value) is type(allowed) for allowed in values):
                    raise self.refusal(field, why)
            elif value:
                raise self.refusal(field, "this field is not known here, so it may change the adapter's meaning")

    def get(self, field: str, default: Any = None) -> Any:
        return self._values.get(field, default)

    def integer(self, field: str, value: Any, *, minimum: int) -> int:
        # `True` is an int in Python, never a rank or a token id.
        if type(value) is not int or not minimum <= value <= _LARGEST:
            raise self.refusal(field, f"{json.dumps(value)} is not an integer from {minimum} to {_LARGEST}")
        return value

    def number(self, field: str, value: Any) -> float:
        if not is_number(value):
            raise self.refusal(field, f"{json.dumps(value)} is not a finite number")
        return float(value)

    def boolean(self, field: str) -> bool:
        value = self.get(field)
        if value not in (True, False, None):
            raise self.refusal(field, "it is neither true nor false")
        return bool(value)

    def text(self, field: str) -> str:
        value = self.get(field)
        if value is not None and not isinstance(value, str):
            raise self.refusal(field, "it must be a string")
        if value and sendable(value) != value:
            raise self.refusal(field, "it holds half of a surrogate pair")
        return value or ""

    def integers(self, field: str, *, minimum: int) -> tuple[int, ...]:
        value = self.get(field)
        items = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(self.integer(field, item, minimum=minimum) for item in items)

    def strings(self, field: str) -> tuple[str, ...]:
        value = self.get(field)
        items = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(item, str) for item in items):
            raise self.refusal(field, "it must be a string or a list of strings")
        return tuple(items)

    def names(self, field: str) -> Names:
        value = self.get(field)
        return value if isinstance(value, str) else self.strings(field)

    def pattern(self, field: str) -> list[tuple[str, Any]]:
        value = self.get(field)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(field, "it must map names to numbers")
        return list((value or {}).items())

"""The benchmark's adapters: stock PEFT, random but seeded, as aLoRA and as a plain LoRA twin with the same weights.

Sixteen of rank 32 on q, k and v, and, to be reported beside them, as many on every linear layer. ``B`` is not zero, as
PEFT would initialise it, and of a size at which answers differ from the base model's while bfloat16 still tells right
from wrong (docs/exactness.md: strong random adapters make bfloat16 itself chaotic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from alora_serve.types import TokenIds

NAMES: Final = (
    *("certainty", "answerability", "hallucination", "rewrite", "jailbreak", "relevance", "citation", "safety"),
    *("clarification", "summary", "topic", "language", "tone", "intent", "entities", "policy"),
)
"""Sixteen questions one may ask about a conversation."""

RANK: Final = 32
TARGETS: Final[dict[str, list[str]]] = {
    "qkv": ["q_proj", "k_proj", "v_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
B_STANDARD_DEVIATION: Final = {"qkv": 0.2, "all-linear": 0.05}
"""Of the entries of ``B``; A is PEFT's own initialisation. Chosen with ``benchmarks/correctness.py``'s rule."""

Kind = Literal["qkv", "all-linear"]
TWIN_SUFFIX: Final = "-lora"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter and its twin.

    Attributes:
        directory: the aLoRA's.
        twin_directory: the plain LoRA's, of the same weights.
        invocation: token ids that turn the aLoRA on.
    """

    name: str
    directory: Path
    twin_directory: Path
    invocation: TokenIds

    @property
    def twin(self) -> str:
        """Name of the plain LoRA."""
        return self.twin_directory.name


def invocation_text(name: str) -> str:
    """As the adapter in ``examples/``: a turn of its own that begins and ends with special tokens."""
    return f"<|im_start|>{name}<|im_end|>"


def ensure_adapters(model: Path, root: Path, *, count: int, kind: Kind = "qkv") -> tuple[Adapter, ...]:
    """The first ``count`` adapters, written to ``root`` where they are not there yet. The first time takes seconds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    adapters = [
        Adapter(
            name,
            root / name,
            root / f"{name}{TWIN_SUFFIX}",
            tuple(tokenizer.encode(invocation_text(name), add_special_tokens=False)),
        )
        for name in NAMES[:count]
    ]
    missing = [adapter for adapter in adapters if not (adapter.twin_directory / "adapter_model.safetensors").exists()]
    if missing:
        _write(model, missing, kind)
    return tuple(adapters)


def _write(model: Path, adapters: Sequence[Adapter], kind: Kind) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # theirs get between ours
    for adapter in adapters:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        torch.manual_seed(NAMES.index(adapter.name))
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            lora_alpha=RANK,
            target_modules=TARGETS[kind],
            alora_invocation_tokens=list(adapter.invocation),
        )
        peft_model = get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, B_STANDARD_DEVIATION[kind])
        peft_model.save_pretrained(adapter.directory)
        # The weights do not depend on the invocation: only the config differs.
        peft_model.peft_config["default"].alora_invocation_tokens = None
        peft_model.save_pretrained(adapter.twin_directory)

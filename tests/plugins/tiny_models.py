"""Seeded models of the served families, a few layers deep, saved in milliseconds, and stock PEFT adapters on them.

Queries and keys are scaled up so that scores are large: a forgotten soft cap or window then changes tokens, which it
does not at the scores of a freshly initialised model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320
WINDOW = 24
MODERATE = {"sharpness": 3.0, "head": 8.0}
"""Of :func:`save_model`: with adapters of ``lora_alpha`` 12, stock PEFT's answers of 200 tokens in bfloat16 lie 0.14
below its float32 at worst, and logits are as large as a trained model's."""
TAU = 0.25
"""How far a right token of an answer in bfloat16 may lie below the best logit of stock PEFT in float32."""
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _config(kind: str, **changes: object) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **{**_COMMON, **changes})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: _config("llama"),
    "qwen2": lambda: _config("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": lambda: _config("qwen3", head_dim=16),
    "granite": lambda: _config(
        "granite", attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=2.0
    ),
    "gemma2": lambda: _config(
        "gemma2",
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        sliding_window=WINDOW,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    ),
    "phi3": lambda: _config("phi3", sliding_window=WINDOW),
}
"""What the parity suite runs. The windowed ones get prompts of more than twice the window."""

_QUERY_KEY = ("q_proj", "k_proj", "qkv_proj", "c_attn", "q_norm", "k_norm")


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with a chat template, of the tiny models' vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<|start|>", "<|end|>", "<|guard|>"]
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def save_model(
    directory: Path, config: PreTrainedConfig, *, seed: int = 0, sharpness: float = 6.0, head: float = 1.0
) -> Path:
    """Write a randomly initialised model whose attention scores are ``sharpness`` squared times larger than usual.

    ``head``: how many times larger its logits are.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2.0)
            if any(part in name for part in _QUERY_KEY) and parameter.dim() >= 2:
                parameter.mul_(sharpness)
        model.get_output_embeddings().weight.mul_(head)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock model, with transformers' reference attention."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def save_adapter(model_directory: Path, directory: Path, *, seed: int, **config: object) -> Path:
    """Write a stock PEFT adapter with random, non-zero weights."""
    torch.manual_seed(seed)
    settings = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "init_lora_weights": False, **config}
    get_peft_model(load_reference(model_directory), LoraConfig(**settings)).save_pretrained(directory)
    return directory


@dataclass(frozen=True, slots=True)
class Reference:
    """What PEFT generates: token ids and, for each, all logits ``[tokens, vocabulary]``."""

    tokens: tuple[int, ...]
    logits: torch.Tensor


def load_peft(
    model_directory: Path, adapter: Path | None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel | PeftModel:
    """The stock model, with a stock PEFT adapter unless that is None."""
    model = load_reference(model_directory, dtype)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def greedy(model: PreTrainedModel | PeftModel, prompt: tuple[int, ...], max_tokens: int) -> Reference:
    """Stock ``generate(input_ids=...)``, greedy, past any end of sequence, cold.

    ``attention_mask`` is given because without it transformers guesses: with ``eos_token_id=None`` it takes every token
    equal to the padding id for padding and masks it, which on SmolLM2 hides each ``<|im_end|>`` of the prompt.
    """
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return Reference(tuple(out.sequences[0, len(prompt) :].tolist()), torch.stack(out.logits)[:, 0].float())


def peft_generate(model_directory: Path, adapter: Path | None, prompt: tuple[int, ...], max_tokens: int) -> Reference:
    """What stock PEFT says to a prompt in fp32: see :func:`greedy`."""
    return greedy(load_peft(model_directory, adapter), prompt, max_tokens)


def forced_logits(
    model: PreTrainedModel | PeftModel, prompt: tuple[int, ...], answer: tuple[int, ...], invocation_start: int | None
) -> torch.Tensor:
    """What a cold PEFT run that is given the answer chooses its tokens from: ``[answer tokens, vocabulary]``."""
    arguments = {}
    if invocation_start is not None:
        arguments["alora_offsets"] = [len(prompt) + len(answer) - invocation_start]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([prompt + answer]), **arguments).logits
    return logits[0, len(prompt) - 1 : -1]


def forced_greedy(
    model: PreTrainedModel | PeftModel, prompt: tuple[int, ...], max_tokens: int, invocation_start: int
) -> tuple[int, ...]:
    """What PEFT generates greedily with the adapter on from ``invocation_start`` on, wherever the invocation is."""
    answer: tuple[int, ...] = ()
    for _ in range(max_tokens):
        logits = forced_logits(model, prompt, (*answer, 0), invocation_start)  # of the last, only its place matters
        answer = (*answer, int(logits[-1].argmax()))
    return answer


def largest_gap(
    reference: PreTrainedModel | PeftModel,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    invocation_start: int | None,
) -> float:
    """How far, at worst, a delivered token's logit lies below the largest in a cold, teacher-forced fp32 PEFT run."""
    return float(forced_gaps(reference, prompt, answer, invocation_start).max())


def forced_gaps(
    reference: PreTrainedModel | PeftModel,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    invocation_start: int | None,
) -> torch.Tensor:
    """How far each delivered token's logit lies below the largest in a cold, teacher-forced PEFT run: ``[tokens]``."""
    logits = forced_logits(reference, prompt, answer, invocation_start).float()
    return logits.max(-1).values - logits[range(len(answer)), list(answer)]

"""Real fast tokenizers of a few hundred tokens, trained in milliseconds, and chat templates with the field's habits."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "    ", "※")

SENTENCES = (
    "The capital of France is Paris, and the answer is in the document.",
    "Is this question answerable? Yes, no, maybe: I am not certain at all.",
    "system user assistant tool im_start im_end endoftext think tool_call",
    "Ärger über Öl, naïve café, 数字 и буквы.\n\nA list:\n * one\n * two\n",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = CHATML.replace("message['content']", "(message['content'] | trim)")
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
DATED = "{{ '<|im_start|>system\nToday is ' + (date or strftime_now('%d %B %Y')) + '<|im_end|>\n' }}" + CHATML
THINKING = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
ENDS_DIFFERENTLY = CHATML.replace("{% endif %}", "{% else %}{{ '<|im_endless|>' }}{% endif %}")
"""Without a generation prompt it goes on in text that shares the beginning ``<|im_`` with the generation prompt."""
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate, not ' + message['content']) }}{% endif %}{% endfor %}" + CHATML
)
GLUED = (
    "{% for message in messages %}{{ '<|im_' + message['content'] + '|>' + message['role'] + message['name'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Puts the user's strings where a control token would stand."""
TOOLS = (
    "{% if documents %}{{ '<|im_start|>documents\n' }}{% for document in documents %}"
    "{{ document['title'] + ': ' + document['text'] + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}"
    "{% for key in tool['function']['parameters']['properties'] %}{{ '<' + key + '>\n' }}{% endfor %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + call['function']['name'] + ' ' }}"
    "{{ call['function']['arguments'] | tojson }}{{ '</tool_call>' }}{% endfor %}"
    "{% if message['role'] == 'tool' %}{{ '\n' ~ message['name'] ~ message['tool_call_id'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trimming": TRIMMING,
    "default_system": DEFAULT_SYSTEM,
    "dated": DATED,
    "thinking": THINKING,
    "tools": TOOLS,
}


def byte_level_tokenizer(
    chat_template: str | dict[str, str] | None = CHATML,
    *,
    special: Sequence[str] = SPECIAL,
    not_special: Sequence[str | AddedToken] = NOT_SPECIAL,
    normalizer: normalizers.Normalizer | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE like that of GPT-2, Qwen or SmolLM2. Any text decodes back to itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if normalizer is not None:
        backend.normalizer = normalizer
    return _wrapped(backend, chat_template, special, not_special)


def byte_fallback_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A BPE with a space put before the text and bytes for unknown characters, like that of Llama 2 or Gemma."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"])
    backend.train_from_iterator(SENTENCES[:3], trainer)
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    state["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(backend, chat_template, SPECIAL, ("<think>",))


def tokenizer_with_unknown_token() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a normalizer that cannot spell ``Z`` and stands ``<unk>`` in for it."""
    state = json.loads(byte_level_tokenizer(special=(), not_special=()).backend_tokenizer.to_str())
    state["model"]["unk_token"] = "<unk>"
    state["model"]["vocab"]["<unk>"] = state["model"]["vocab"].pop("Z")
    backend = Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.NFC()
    return _wrapped(backend, CHATML, (*SPECIAL, "<unk>"), NOT_SPECIAL)


def _wrapped(
    backend: Tokenizer,
    chat_template: str | dict[str, str] | None,
    special: Sequence[str],
    not_special: Sequence[str | AddedToken],
) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, normalized=False) if isinstance(t, str) else t for t in not_special])
    return tokenizer

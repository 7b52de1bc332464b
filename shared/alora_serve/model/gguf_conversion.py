"""Turns one Llama GGUF file into a Hugging Face directory: bfloat16 safetensors, config, tokenizer, chat template.

Runs as its own process (``python -m alora_serve.model.gguf_conversion FILE OUTPUT``), so that whoever asks for the demo
model neither imports torch nor keeps the memory of the conversion. Each finished stage is one line on standard output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

STAGES = ("read", "convert", "save", "check")
"""What the process prints, in this order, when it has done it."""

_CHECK_PROMPT = "The capital of France is"
_CHECK_CONTINUATION = " Paris"


def convert_gguf(gguf_file: Path, output_directory: Path) -> None:
    """Write ``output_directory`` (created if missing) from ``gguf_file``.

    The quantised weights are dequantised once and stored as bfloat16, so that a run in bfloat16 and a run in float32
    compute with the same numbers.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = str(gguf_file.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file.name)
    loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=gguf_file.name, dtype=torch.float32)
    print("read", flush=True)

    # The loaded module refuses to be saved ("quantized with gguf") and its configuration claims a quantisation that the
    # dequantised weights no longer have; a fresh module from the cleaned configuration has neither fault.
    config = loaded.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    fresh = LlamaForCausalLM(config).bfloat16()
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    # transformers ignores GGUF's ``tokenizer.ggml.pre = smollm``: every digit is a piece of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    print("convert", flush=True)

    fresh.save_pretrained(output_directory)
    tokenizer.save_pretrained(output_directory)
    print("save", flush=True)


def check_model(directory: Path) -> None:
    """Load ``directory`` as any user would and ask it for one token.

    Raises:
        RuntimeError: it lost its chat template or end token, or predicts nonsense.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not tokenizer.chat_template or tokenizer.eos_token != "<|im_end|>":
        raise RuntimeError(
            f"the tokenizer in {directory} lost its chat template or its end token {tokenizer.eos_token!r}"
        )
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    prompt = torch.tensor([tokenizer.encode(_CHECK_PROMPT)])  # [1, tokens]
    with torch.inference_mode():
        best = int(model(input_ids=prompt).logits[0, -1].argmax())
    if tokenizer.decode([best]) != _CHECK_CONTINUATION:
        raise RuntimeError(f"the converted model continues {_CHECK_PROMPT!r} with {tokenizer.decode([best])!r}")


def main() -> None:
    """Convert the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf_file", type=Path)
    parser.add_argument("output_directory", type=Path)
    arguments = parser.parse_args()
    convert_gguf(arguments.gguf_file, arguments.output_directory)
    check_model(arguments.output_directory)
    print("check", flush=True)


if __name__ == "__main__":
    main()

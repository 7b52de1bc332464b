"""One digest stands for the tokenizer and its templates, the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tokenizers import AddedToken, normalizers

import small_tokenizers as small
from alora_serve.model.chat import ChatTokenizer


def test_the_digest_changes_with_every_part_that_decides_on_tokens() -> None:
    plain = small.byte_level_tokenizer()
    with_eos = small.byte_level_tokenizer()
    with_eos.eos_token = "<|im_end|>"
    variants = [
        plain,
        with_eos,
        small.byte_level_tokenizer(small.TRIMMING),
        small.byte_level_tokenizer({"default": small.CHATML}),
        small.byte_level_tokenizer(not_special=()),
        small.byte_level_tokenizer(not_special=[AddedToken(small.NOT_SPECIAL[0], lstrip=True), *small.NOT_SPECIAL[1:]]),
        small.byte_level_tokenizer(normalizer=normalizers.NFC()),
        small.byte_fallback_tokenizer(),
    ]
    digests = [ChatTokenizer(tokenizer).digest for tokenizer in variants]
    assert len(set(digests)) == len(variants)
    assert ChatTokenizer(small.byte_level_tokenizer()).digest == digests[0]
    assert len(digests[0]) == 32


def test_the_digest_does_not_depend_on_the_order_of_templates() -> None:
    names = ("default", "tool_use")
    one, other = (
        ChatTokenizer(small.byte_level_tokenizer(dict.fromkeys(order, small.CHATML))) for order in (names, names[::-1])
    )
    assert one.digest == other.digest


def test_the_digest_is_the_same_in_every_process(tmp_path: Path) -> None:
    small.byte_level_tokenizer().save_pretrained(tmp_path)
    script = (
        "import sys; from transformers import PreTrainedTokenizerFast as Tokenizer;"
        "from alora_serve.model.chat import ChatTokenizer;"
        "print(ChatTokenizer(Tokenizer.from_pretrained(sys.argv[1])).digest.hex())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1

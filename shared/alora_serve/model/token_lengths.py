"""How much text one token can stand for: by that, text that cannot fit is known without being tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from tokenizers.pre_tokenizers import ByteLevel

_KEEP_ALL: Final = frozenset({"ByteLevel", "Digits", "Split", "Punctuation"})
"""Pre-tokenizers that lose no text, unless told to."""


def longest_token_bytes(serialized: Mapping[str, Any]) -> int | None:
    """The most bytes of UTF-8 that one token stands for; None where a tokenizer of that kind does not say.

    Known of byte-level BPE alone, with every byte in its vocabulary and nothing before it that shortens text: what a
    normalizer makes of text may be shorter, a token for unknown characters stands for any number, and an added token
    that strips what is beside it takes any number of blanks along.

    Args:
        serialized: as in ``tokenizer.json``.
    """
    model, added = serialized["model"], serialized["added_tokens"]
    steps = _steps(serialized["pre_tokenizer"])
    is_known = (
        model["type"] == "BPE"
        and serialized["normalizer"] is None
        and any(step["type"] == "ByteLevel" for step in steps)
        and all(step["type"] in _KEEP_ALL and step.get("behavior") != "Removed" for step in steps)
        and all(byte in model["vocab"] for byte in ByteLevel.alphabet())
        and not any(token["lstrip"] or token["rstrip"] for token in added)
    )
    if not is_known:
        return None
    # In byte-level vocabularies a character stands for a byte.
    return max(*map(len, model["vocab"]), *(len(token["content"].encode()) for token in added))


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for one in pre_tokenizer["pretokenizers"] for step in _steps(one)]
    return [pre_tokenizer]

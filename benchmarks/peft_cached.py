"""The baseline without a server: PEFT's aLoRA in this process, with the base prefix's cache computed before and copied.

Run as a process of its own, so that neither side shares memory or threads with the other::

    python benchmarks/peft_cached.py MODEL ADAPTER DTYPE ROUNDS < prompts.json

``prompts.json`` is a list of lists of prefix token ids; the answer is a list of lists of ``[first, total]`` seconds.
"""

from __future__ import annotations

import copy
import json
import sys
from time import perf_counter

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache

ANSWER_TOKENS = 16


def ask(model: PeftModel, prefix: list[int], invocation: list[int], cache: DynamicCache) -> tuple[float, float]:
    """Greedy tokens after the invocation on a copy of the cached prefix; seconds to the first and to the last.

    ``alora_offsets`` is passed on every call: without it PEFT's aLoRA layers silently run base weights.
    """
    began = perf_counter()
    used = copy.deepcopy(cache)
    ids = torch.tensor([invocation])
    first = 0.0
    for position in range(ANSWER_TOKENS):
        start = len(prefix) if position == 0 else used.get_seq_length()
        positions = torch.arange(start, start + ids.shape[1])[None]
        out = model(input_ids=ids, cache=used, position_ids=positions, use_cache=True, alora_offsets=[ids.shape[1]])
        ids = out.logits[:, -1:].argmax(-1)
        int(ids)
        first = first or perf_counter() - began
    return first, perf_counter() - began


def main() -> None:
    """See the module."""
    model_directory, adapter, dtype, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    base = AutoModelForCausalLM.from_pretrained(
        model_directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model = PeftModel.from_pretrained(base, adapter).eval()
    invocation = list(model.peft_config["default"].alora_invocation_tokens)
    results = []
    with torch.inference_mode():
        for prefix in json.load(sys.stdin):
            cache = DynamicCache(config=base.config)
            with model.disable_adapter():
                model(input_ids=torch.tensor([prefix]), cache=cache, use_cache=True, logits_to_keep=1)
            ask(model, prefix, invocation, cache)
            results.append([ask(model, prefix, invocation, cache) for _ in range(rounds)])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

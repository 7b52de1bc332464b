"""Computes prompts cold with stock transformers and PEFT, and says whether served tokens are the ones they give.

``python -m alora_serve.cli.peft_check`` reads one JSON object from standard input and prints one. It is a process of
its own so that the command line needs no torch, and it shares no code with the engine: it is the reference.

Input: ``model`` (directory), ``dtype`` (of the served model), ``cases``: a list of ``name``, ``adapter`` (directory, or
null for the base model), ``prompt`` and ``tokens`` (token ids served). Output: ``cases``: a list of ``name``, ``equal``
and what the reference found (``peft_tokens`` or ``largest_gap``); and ``versions``.

What equal means: in float32, the same greedy tokens. In bfloat16 rounding alone picks another of two nearly equal
tokens, so the served tokens are run through the float32 reference, and one is wrong if its logit is more than
``BFLOAT16_TOLERANCE`` below the largest.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

BFLOAT16_TOLERANCE: Final = 0.25
"""In logits. Stock SmolLM2 in bfloat16 fell at most 0.115 short of its float32 self, over 576 greedy tokens."""


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Compute every case; see the module."""
    cases = []
    models: dict[str | None, Any] = {}
    for case in request["cases"]:
        adapter, prompt, tokens = case["adapter"], case["prompt"], case["tokens"]
        model = models[adapter] = models.get(adapter) or _reference(Path(request["model"]), adapter)
        if request["dtype"] == "float32":
            greedy = _generate(model, prompt, len(tokens))
            cases.append({"name": case["name"], "equal": greedy == tokens, "peft_tokens": greedy})
        else:
            gap = _largest_gap(model, prompt, tokens)
            cases.append({"name": case["name"], "equal": gap <= BFLOAT16_TOLERANCE, "largest_gap": gap})
    return {"cases": cases, "versions": {name: version(name) for name in ("torch", "transformers", "peft")}}


def _reference(directory: Path, adapter: str | None) -> Any:
    """The stock model, with the stock adapter on it, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


@torch.no_grad()
def _generate(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens, past any end of sequence."""
    ids = torch.tensor([prompt])  # [1, prompt_tokens]
    # input_ids by name: PEFT does not find the invocation in a positional argument. The mask, because transformers
    # would otherwise guess that the padding token, which ends each turn here, hides a position.
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.no_grad()
def _largest_gap(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """How far the worst of ``tokens`` is below the most likely one, in logits, each after those before it."""
    ids = torch.tensor([prompt + tokens[:-1]])  # [1, prompt_tokens + answer_tokens - 1]
    logits = model(input_ids=ids, logits_to_keep=len(tokens)).logits[0].float()  # [answer_tokens, vocabulary]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())


def main() -> None:
    """Read standard input, print the result."""
    print(json.dumps(check(json.load(sys.stdin))))


if __name__ == "__main__":
    main()

"""Trains an aLoRA as one does with PEFT alone: whole prompts, padded batches, logits of every position.

A program: reads one JSON object (``model``, ``dtype``, ``threads``, ``rank``, ``alpha``, ``targets``, ``invocation``,
``learning_rate``, ``weight_decay``, ``batches``: in the order of training, each of parts whose gradients are summed,
each a list of ``[prompt tokens, answer tokens]``). Prints ``{"cpu_seconds", "losses"}``, of all steps.
"""

from __future__ import annotations

import json
import sys
from time import process_time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def padded(part: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right; labels ``[rows, longest]`` are -100 everywhere but in the answers."""
    longest = max(len(prompt) + len(answer) for prompt, answer in part)
    tokens = torch.zeros(len(part), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, (prompt, answer) in enumerate(part):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def train(given: dict[str, Any]) -> dict[str, Any]:
    """All steps; their losses."""
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"]))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=given["rank"],
        lora_alpha=given["alpha"],
        target_modules=given["targets"],
        alora_invocation_tokens=given["invocation"],
    )
    model = get_peft_model(base, config).train()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(adapter, lr=given["learning_rate"], weight_decay=given["weight_decay"])
    began, losses = process_time(), []
    for batch in given["batches"]:
        answers = sum(len(answer) for part in batch for _, answer in part)
        losses.append(0.0)
        for part in batch:
            share = sum(len(answer) for _, answer in part) / answers
            loss = model(**padded(part), use_cache=False).loss * share
            loss.backward()
            losses[-1] += loss.item()
        optimiser.step()
        optimiser.zero_grad()
    return {"cpu_seconds": process_time() - began, "losses": losses}


if __name__ == "__main__":
    print("\n" + json.dumps(train(json.load(sys.stdin))))

"""Bound answers and likely tokens on the real model's vocabulary, in fp32."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import jsonschema
import pytest
import torch

from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import ChatMessage, Choice, FinishReason, JsonSchema, Prompt, Regex, Resume
from in_process import MemoryStore, open_stack
from tiny_models import forced_logits, load_peft

QUESTION = (
    "Berlin is the capital of Germany. About 3.9 million people live there. It lies on the Spree. Describe the city."
)
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Germany", "Spain"]},
        "millions": {"type": "number", "minimum": 0, "maximum": 40},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 2},
    },
    "required": ["city", "country", "millions", "rivers"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(demo_model_directory: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(demo_model_directory, dtype="float32")


async def test_the_real_model_fills_in_a_form_and_goes_on_with_it_from_any_worker(
    model: BaseModel, demo_model_directory: Path
) -> None:
    async with open_stack(model, MemoryStore()) as stack:
        await asyncio.to_thread(stack.decoder.warm)
        handle = (await stack.prefill(Prompt((ChatMessage("user", QUESTION),)))).handle
        form = JsonSchema(json.dumps(CITY))
        bound = {"structured_output": form, "ignore_eos": False, "max_tokens": 80, "top_logprobs": 20}
        answer, verdict, code, free = await asyncio.gather(
            stack.generate(handle, **bound),
            stack.generate(handle, structured_output=Choice(("Yes", "No", "Unsure")), ignore_eos=False, max_tokens=8),
            stack.generate(
                handle, structured_output=Regex("[A-Z]{3}-[0-9]{4}"), ignore_eos=False, temperature=1.0, seed=1
            ),
            stack.generate(handle, max_tokens=12),
        )
        assert answer.finished.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(answer.text), CITY)
        assert json.loads(answer.text)["country"] == "Germany"
        assert verdict.text in ("Yes", "No", "Unsure")
        jsonschema.validate(code.text, {"pattern": "^[A-Z]{3}-[0-9]{4}$"})
        assert free.text.startswith("Berlin"), "unbound, in one batch with them"
        middle = len(answer.tokens) // 2
        rest = await stack.generate(handle, resume=Resume(answer.tokens[:middle], None, ""), **bound)  # type: ignore[arg-type]
        assert answer.tokens[:middle] + rest.tokens == answer.tokens
    prompt = handle.prefix_tokens + handle.generation_prompt_tokens
    logits = forced_logits(load_peft(demo_model_directory, None), prompt, answer.tokens, None)
    for chunk, expected in zip(answer.chunks, torch.log_softmax(logits, dim=-1), strict=True):
        [top] = chunk.top_logprobs
        assert [token.logprob for token in top] == pytest.approx(expected.topk(20).values.tolist(), abs=2e-3)
        assert all(abs(token.logprob - float(expected[token.token_id])) < 2e-3 for token in top)
        assert chunk.logprobs[0] == pytest.approx(float(expected[chunk.token_ids[0]]), abs=2e-3)
    assert b"".join(spelt for chunk in answer.chunks for spelt in chunk.token_bytes).decode() == answer.text

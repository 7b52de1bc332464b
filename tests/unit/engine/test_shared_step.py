"""However many sequences and adapters share a prefix, a step makes as many calls as for one, and expands no head."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from alora_serve.engine import adapter_stack
from alora_serve.engine.core import CoreOptions
from alora_serve.model import packed_row
from alora_serve.model.loader import BaseModel
from alora_serve.model.step import Span
from alora_serve.types import Prompt
from in_process import MemoryStore, Stack, open_stack
from tiny_models import save_adapter

SEQUENCES = 16
CONVERSATION = tuple(range(20, 84))
INVOCATION = (258, 10, 258)


@pytest.fixture(scope="module")
def sixteen(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sixteen")
    for seed in range(SEQUENCES):
        save_adapter(
            model_directory,
            root / f"a{seed}",
            seed=seed,
            target_modules=["q_proj", "k_proj", "v_proj"],
            alora_invocation_tokens=list(INVOCATION),
        )
    return root


@pytest.fixture
async def stack(model: BaseModel, sixteen: Path) -> AsyncIterator[Stack]:
    async with open_stack(model, MemoryStore(), sixteen, options=CoreOptions(block_tokens=16)) as opened:
        yield opened


class Watch:
    """What the steps called that ran one token of each of so many sequences."""

    def __init__(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: dict[int, list[Counter[str]]] = {}
        self.heads: set[int] = set()
        self._calls: Counter[str] = Counter()
        runner = stack.core.engine._stepper._runner
        forward, attend, products = runner.forward, packed_row.attend, adapter_stack._products

        def watched_forward(spans: Sequence[Span], *arguments: Any) -> Tensor | None:
            self._calls = Counter()
            logits = forward(spans, *arguments)
            if all(len(span.tokens) == 1 for span in spans):
                self.steps.setdefault(len(spans), []).append(self._calls)
            return logits

        def watched_attend(query: Tensor, key: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
            self._calls["attend"] += 1
            if key.shape[0] == 1 and key.shape[2] == len(CONVERSATION):
                self._calls["attend to the prefix"] += 1
                self.heads.add(key.shape[1])
            return attend(query, key, *arguments, **options)

        def watched_products(*arguments: Tensor) -> Tensor:
            self._calls["adapter products"] += 1
            return products(*arguments)

        monkeypatch.setattr(runner, "forward", watched_forward)
        monkeypatch.setattr(packed_row, "attend", watched_attend)
        monkeypatch.setattr(adapter_stack, "_products", watched_products)


async def test_a_step_of_sixteen_adapters_on_one_prefix_makes_the_calls_of_a_step_of_one(
    stack: Stack, model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
    watch = Watch(stack, monkeypatch)
    await stack.generate(handle, "a0", max_tokens=8)
    names = [f"a{seed}" for seed in range(SEQUENCES)]
    await asyncio.gather(*(stack.generate(handle, name, max_tokens=24) for name in names))
    alone, together = watch.steps[1][0], watch.steps[SEQUENCES][-1]
    assert together == alone
    layers, kv_heads = model.layout.layers, model.layout.kv_heads
    assert alone == {"attend": 2 * layers, "attend to the prefix": layers, "adapter products": 4 * layers}
    assert watch.heads == {kv_heads}
    assert kv_heads < model.module.config.num_attention_heads


async def test_adapters_that_lie_in_every_other_slot_run_in_one_call_and_answer_as_before(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
    names = [f"a{seed}" for seed in range(SEQUENCES)]
    before = await asyncio.gather(*(stack.generate(handle, name, max_tokens=24) for name in names))
    watch = Watch(stack, monkeypatch)
    await stack.generate(handle, "a0", max_tokens=8)
    after = await asyncio.gather(*(stack.generate(handle, name, max_tokens=24) for name in names[::2]))
    assert watch.steps[SEQUENCES // 2][-1] == watch.steps[1][0]
    assert [answer.tokens for answer in after] == [answer.tokens for answer in before[::2]]
    assert len({answer.tokens for answer in after}) > 1


async def test_one_adapter_under_two_names_answers_each_of_its_conversations_as_alone(
    model: BaseModel, sixteen: Path, tmp_path: Path
) -> None:
    """A folder and its copy have one digest, and so one slot."""
    for name in ("a0", "copy"):
        shutil.copytree(sixteen / "a0", tmp_path / name)
    async with open_stack(model, MemoryStore(), tmp_path, options=CoreOptions(block_tokens=16)) as stack:
        conversations = [CONVERSATION, tuple(range(120, 190))]
        asked = [
            ((await stack.prefill(Prompt(token_ids=tokens))).handle, name)
            for tokens, name in zip(conversations, ("a0", "copy"), strict=True)
        ]
        alone = [await stack.generate(handle, name, max_tokens=24) for handle, name in asked]
        together = await asyncio.gather(*(stack.generate(handle, name, max_tokens=24) for handle, name in asked))
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert alone[0].tokens != alone[1].tokens

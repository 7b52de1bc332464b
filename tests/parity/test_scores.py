"""Scores equal stock PEFT's: the log-probability of every given token, cold, teacher-forced, in fp32."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from alora_serve.engine.core import CoreOptions
from alora_serve.engine.stepper import EngineLimits
from alora_serve.errors import (
    AdapterNotFoundError,
    AloraServeError,
    ContextExceededError,
    HandleInvalidError,
    InvalidRequestError,
    StepFailedError,
)
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import ChatMessage, PrefixHandle, Prompt, ScoreRequest, ScoreResult
from in_process import MemoryStore, Stack, open_stack
from tiny_models import FAMILIES, forced_logits, load_peft, save_adapter, save_model

GUARD = (258, 10, 258)
TARGETS = {"gpt2": ["c_attn"]}
CONVERSATION = tuple(torch.randint(1, 256, (75,), generator=torch.Generator().manual_seed(1)).tolist())
CONTINUATIONS = ("yes", "no", "It is <|guard|> in text, and longer than a step of the engine takes, by far.", "y")
OPTIONS = CoreOptions(block_tokens=16, limits=EngineLimits(max_step_tokens=32))


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def model_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("scored") / request.param, FAMILIES[request.param]())


@pytest.fixture(scope="module")
def adapters(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, targets = tmp_path_factory.mktemp("adapters"), TARGETS.get(model_directory.name, ["q_proj", "k_proj"])
    save_adapter(model_directory, root / "guard", seed=1, target_modules=targets, alora_invocation_tokens=list(GUARD))
    save_adapter(model_directory, root / "lora", seed=2, target_modules=targets)
    return root


@pytest.fixture(scope="module")
def model(model_directory: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(model_directory, dtype="float32")


async def score(stack: Stack, handle: PrefixHandle, adapter: str = "", *continuations: str) -> ScoreResult:
    return await stack.scorer.score(ScoreRequest(handle, adapter, continuations or CONTINUATIONS))


@pytest.mark.parametrize("adapter", ["guard", "lora", ""])
async def test_scores_are_pefts(model: BaseModel, model_directory: Path, adapters: Path, adapter: str) -> None:
    prompt = CONVERSATION + GUARD if adapter == "guard" else CONVERSATION
    start = len(CONVERSATION) if adapter == "guard" else None
    reference = load_peft(model_directory, adapters / adapter if adapter else None)
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        prefilled = await stack.prefill(Prompt(token_ids=CONVERSATION))
        result = await score(stack, prefilled.handle, adapter)
    assert len(result.scores) == len(CONTINUATIONS)
    for text, scored in zip(CONTINUATIONS, result.scores, strict=True):
        assert model.tokenizer.decode(scored.token_ids) == text
        logits = forced_logits(reference, prompt, scored.token_ids, start)
        expected = torch.log_softmax(logits, dim=-1)[range(len(scored.token_ids)), list(scored.token_ids)]
        assert torch.tensor(scored.logprobs) == pytest.approx(expected, abs=1e-4)
    assert result.usage.prompt_tokens == len(prompt)
    # The prompt's last token runs each time: its row says how likely the first given token is.
    assert result.usage.cached_tokens == {"guard": len(CONVERSATION), "lora": 0, "": len(CONVERSATION) - 1}[adapter]


async def test_scores_run_beside_answers_and_change_neither(model: BaseModel, adapters: Path) -> None:
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
        answers = [await stack.generate(handle, name, max_tokens=40) for name in ("guard", "")]
        alone = [await score(stack, handle, name) for name in ("guard", "")]
        told = await asyncio.gather(
            *(stack.generate(handle, name, max_tokens=40) for name in ("guard", "")),
            *(score(stack, handle, name) for name in ("guard", "")),
        )
    assert [answer.tokens for answer in told[:2]] == [answer.tokens for answer in answers]
    for beside, before in zip(told[2:], alone, strict=True):
        for one, other in zip(beside.scores, before.scores, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


async def test_an_adapter_whose_numbers_overflow_has_no_scores_and_leaves_others_theirs(
    model: BaseModel, model_directory: Path, tmp_path: Path
) -> None:
    targets = TARGETS.get(model_directory.name, ["q_proj", "k_proj"])
    for name, alpha in (("guard", 32), ("overflows", 1e38)):
        lora = {"target_modules": targets, "lora_alpha": alpha, "alora_invocation_tokens": list(GUARD)}
        save_adapter(model_directory, tmp_path / name, seed=1, **lora)
    async with open_stack(model, MemoryStore(), tmp_path, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
        alone = await score(stack, handle, "guard")
        failed, beside = await asyncio.gather(
            score(stack, handle, "overflows"), score(stack, handle, "guard"), return_exceptions=True
        )
    assert isinstance(failed, AloraServeError)
    assert not isinstance(failed, StepFailedError), "no other endpoint would fare better"
    assert "no token can be chosen or scored" in str(failed)
    assert isinstance(beside, ScoreResult)
    for one, other in zip(beside.scores, alone.scores, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


async def test_a_generated_answer_scores_as_it_was_generated(model: BaseModel, adapters: Path) -> None:
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(messages=(ChatMessage("user", "Is it so?"),)))).handle
        for adapter in ("guard", ""):
            texts = [chr(97 + index) for index in range(20)]  # more than are in the batch together
            result = await score(stack, handle, adapter, *texts)
            best = max(result.scores, key=lambda scored: scored.total)
            biased = {token: 100.0 for scored in result.scores for token in scored.token_ids}
            answer = await stack.generate(handle, adapter, max_tokens=1, logit_bias=biased)
            assert answer.tokens == best.token_ids
            assert answer.logprobs == pytest.approx(best.logprobs, abs=1e-4)


async def test_the_prompt_is_computed_once_and_stored_without_what_was_scored(model: BaseModel, adapters: Path) -> None:
    store = MemoryStore()
    async with open_stack(model, store, adapters, options=OPTIONS) as stack:
        handle = (await stack.prefiller.prefill(Prompt(token_ids=CONVERSATION), tokenize_only=True)).handle
        await score(stack, handle, "guard")
        await stack.core.drain()
        prefilled = await stack.prefill(Prompt(token_ids=CONVERSATION))
        assert prefilled.usage.computed_tokens == 0
        held = dict(store.values)
        await score(stack, handle, "guard", "something else")
        await stack.core.drain()
        assert store.values == held
    # Base tokens once; the invocation and each continuation but for its last token, for each.
    given = [len(text.encode()) for text in (*CONTINUATIONS, "something else")]
    assert stack.metrics.counts["step tokens"] == len(CONVERSATION) + sum(n - 1 + len(GUARD) for n in given)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"continuations": ("a", "")}, InvalidRequestError, r"continuations\[1\]: has no tokens"),
        ({"continuations": ("a" * 500,)}, ContextExceededError, "exceeds the context of 512"),
        ({"continuations": ("a" * 500, "a" * 10**6)}, ContextExceededError, "exceeds the context of 512"),
        ({"adapter": "nobody"}, AdapterNotFoundError, "nobody"),
        ({"tenant": "other"}, HandleInvalidError, "handle"),
    ],
)
async def test_what_cannot_be_scored_is_refused(
    model: BaseModel, adapters: Path, changes: dict[str, object], error: type[AloraServeError], told: str
) -> None:
    options = CoreOptions(block_tokens=16, tenant_salt=b"some salt of this deployment")
    async with open_stack(model, MemoryStore(), adapters, options=options) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
        fields: dict[str, object] = {"handle": handle, "adapter": "", "continuations": ("a",), **changes}
        with pytest.raises(error, match=told):
            await stack.scorer.score(ScoreRequest(**fields))  # type: ignore[arg-type]
        assert stack.core.engine.load.requests == 0

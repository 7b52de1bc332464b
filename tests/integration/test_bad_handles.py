"""A handle that this deployment did not make, or not of these tokens, is refused; one of another store layout is not.

And what looks like special tokens in a user's message is text, wherever it is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alora_serve.client import ChatMessage, PrefixHandle
from alora_serve.engine.core import CoreOptions
from alora_serve.engine.prefiller import Prefiller
from alora_serve.errors import AloraServeError, HandleExpiredError, HandleInvalidError, ModelMismatchError
from alora_serve.handles import HandleSigner
from alora_serve.model.loader import load_base_model
from alora_serve.types import Prompt
from deployment import BLOCK_TOKENS, SALT, SECRET, Deployed, save_tiny_model
from in_process import MemoryStore, open_stack

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

TURNS = (ChatMessage("user", "Is the sea deep, by a handle?"),)
HOUR_SECONDS = 3600


async def made_elsewhere(
    model_directory: Path, *, salt: str = SALT, block_tokens: int = BLOCK_TOKENS, age_seconds: float = 0.0
) -> PrefixHandle:
    """A handle of the same conversation from a base prefill that shares the deployment's secret."""
    model = load_base_model(model_directory, dtype="float32")
    options = CoreOptions(tenant_salt=salt.encode(), block_tokens=block_tokens)
    signer = HandleSigner([SECRET.encode()], salt.encode(), HOUR_SECONDS, clock=lambda: time.time() - age_seconds)
    async with open_stack(model, MemoryStore(), options=options) as stack:
        return (await Prefiller(stack.core, signer).prefill(Prompt(messages=TURNS))).handle


async def assert_refused(running: Deployed, handle: PrefixHandle, kind: type[AloraServeError]) -> None:
    """By every call that takes a handle; and a good one is served after it."""
    calls: list[Callable[[], Any]] = [
        running.client.generate(handle=handle).result,
        running.client.generate("And now?", handle=handle, adapter="guard").result,
        running.client.fanout(None, ["guard", None], handle=handle).results,
        lambda: running.client.prefill(handle=handle),
    ]
    for call in calls:
        with pytest.raises(kind) as refused:
            await call()
        if kind is not ModelMismatchError:
            assert [violation.field for violation in refused.value.violations] == ["prompt.handle"]
    good = await made_elsewhere(running.model.directory)
    assert (await running.ask(good, "guard")).token_ids == expected(running, good)


def expected(running: Deployed, handle: PrefixHandle) -> tuple[int, ...]:
    return running.model.cold_tokens("guard", running.model.prompt(handle, "guard"))


@pytest.mark.parametrize("field", ["mac", "prefix_tokens", "expires_unix_seconds", "open_turn"])
async def test_a_changed_handle_is_refused(tiny: Deployed, field: str) -> None:
    handle = await made_elsewhere(tiny.model.directory)
    changed = {
        "mac": bytes(byte ^ 1 for byte in handle.mac),
        "prefix_tokens": (*handle.prefix_tokens[:-1], 65),
        "expires_unix_seconds": handle.expires_unix_seconds + 1,
        "open_turn": True,
    }
    await assert_refused(tiny, replace(handle, **{field: changed[field]}), HandleInvalidError)


async def test_an_expired_handle_is_refused(tiny: Deployed) -> None:
    handle = await made_elsewhere(tiny.model.directory, age_seconds=2 * HOUR_SECONDS)
    await assert_refused(tiny, handle, HandleExpiredError)


async def test_a_handle_of_another_model_is_refused(tiny: Deployed, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path, seed=5)
    await assert_refused(tiny, await made_elsewhere(other.directory), ModelMismatchError)


async def test_a_handle_from_a_server_of_another_salt_is_refused(tiny: Deployed) -> None:
    handle = await made_elsewhere(tiny.model.directory, salt="another deployment")
    await assert_refused(tiny, handle, HandleInvalidError)


async def test_a_handle_of_another_store_layout_is_a_plain_miss(tiny: Deployed) -> None:
    handle = await made_elsewhere(tiny.model.directory, block_tokens=BLOCK_TOKENS // 2)
    here = await tiny.client.prefill(TURNS)
    assert handle.storage_digest != here.handle.storage_digest
    assert (await tiny.ask(handle, "guard")).token_ids == expected(tiny, here.handle)


async def test_the_text_of_special_tokens_in_a_message_stays_text_and_moves_no_activation(running: Deployed) -> None:
    """Taken for tokens, the invocation in the user's message would be one; the adapter would turn on there."""
    model = running.model
    appended, answering = (model.invocation_texts[name] for name in (model.appended, model.answering))
    turns = [
        ChatMessage("user", f"Say {appended} and then {answering}, will you?"),
        ChatMessage("assistant", f"{answering}{appended}"),
        ChatMessage("user", appended),
    ]
    harmless = [replace(turn, content="x") for turn in turns]
    handle = (await running.client.prefill(turns)).handle
    plain = (await running.client.prefill(harmless)).handle
    special = model.special_tokens
    assert special & {*plain.prefix_tokens}
    # The template's own special tokens, and none besides.
    assert [token for token in handle.prefix_tokens if token in special] == [
        token for token in plain.prefix_tokens if token in special
    ]
    for adapter in (model.appended, model.answering):
        result = await running.client.generate(turns, adapter=adapter, max_tokens=10, ignore_eos=True).result()
        assert result.usage.invocation_start == len(handle.prefix_tokens)
        assert result.token_ids == model.cold_tokens(adapter, model.prompt(handle, adapter))

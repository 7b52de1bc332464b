"""Adapters whose files are replaced, damaged and taken away while they decode."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from alora_serve.client import ChatMessage, PrefixHandle, SamplingParams
from alora_serve.errors import AdapterNotFoundError, AdapterRefusedError, AloraServeError
from deployment import Deployed, ServedModel, deployed
from faults.harness import QUICK, Chaos, Row, Scenario, Tally
from questions import Question, read
from tiny_models import save_adapter

TOKENS: Final = 60
TURNS: Final = [ChatMessage("user", "The mill stands by the brook, and its wheel turns. What turns?")]
SAMPLING: Final = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
WEIGHTS: Final = "adapter_model.safetensors"
NAMES: Final = ("guard", "answer", "plain")
SWAP_EVERY_SECONDS: Final = 0.7
"""Less than an answer takes under load, so that files change beneath running ones."""


@dataclass(slots=True)
class Versions:
    """What each version of each adapter answers, by its digest, as stock PEFT has it.

    Attributes:
        answers: by adapter and digest.
        seen: versions that were served.
    """

    answers: Mapping[str, Mapping[str, tuple[int, ...]]]
    seen: set[tuple[str, str]] = field(default_factory=set)

    def is_right(self, adapter: str, digest: str, tokens: tuple[int, ...]) -> bool:
        """Whether that version answers so."""
        self.seen.add((adapter, digest))
        return self.answers[adapter].get(digest) == tokens


def copied(model: ServedModel, root: Path) -> ServedModel:
    """The same model with adapters of its own, to be damaged."""
    [adapters] = model.roots
    shutil.copytree(adapters, root)
    return replace(model, roots=(root,))


def swap_weights(weights: Path, adapter: Path) -> None:
    """Put another weights file in an adapter's place, as deployments do: written beside it, then renamed."""
    beside = adapter / "weights.new"
    shutil.copyfile(weights, beside)
    beside.replace(adapter / WEIGHTS)


async def digest_of(running: Deployed, name: str) -> str:
    """Of the version that is served now."""
    return next(adapter.digest for adapter in await running.client.list_adapters() if adapter.name == name)


async def changes_under_fire(chaos: Chaos) -> list[Row]:
    """One adapter swaps between two versions; another is corrupted, made of a wrong shape, deleted and brought back."""
    place = chaos.place("adapters")
    model = copied(chaos.model, place / "served")
    spare = place / "spare"
    shutil.copytree(chaos.model.roots[0], spare / "first")
    invocation = list(model.invocations["guard"])
    settings = {"target_modules": "all-linear", "alora_invocation_tokens": invocation}
    save_adapter(model.directory, spare / "second" / "guard", seed=77, **settings)
    save_adapter(model.directory, spare / "other-shape", seed=78, **settings, r=4)
    second = replace(model, roots=(spare / "second",))
    async with deployed(model, f"lmdb://{place}/kv", workers=2, adapter_scan_seconds="0.2", **QUICK) as running:
        handle = (await running.client.prefill(TURNS)).handle
        prompts = {name: model.prompt(handle, name) for name in NAMES}
        first_digest = await digest_of(running, "guard")
        answers = {
            name: {await digest_of(running, name): model.cold_tokens(name, prompts[name], TOKENS)} for name in NAMES
        }
        guard = model.roots[0] / "guard"
        swap_weights(spare / "second" / "guard" / WEIGHTS, guard)
        second_digest = await changed_from(running, "guard", first_digest)
        answers["guard"][second_digest] = second.cold_tokens("guard", prompts["guard"], TOKENS)
        versions = Versions(answers)

        swapped, broken = Tally(), Tally()
        stop = asyncio.Event()
        asking = [
            asyncio.create_task(ask_until(stop, running, handle, name, versions, tally))
            for name, tally in (("guard", swapped), ("guard", swapped), ("answer", broken), ("plain", broken))
        ]
        for number in range(chaos.pick(4, 30)):
            source = spare / ("first" if number % 2 == 0 else "second") / "guard"
            swap_weights(source / WEIGHTS, guard)
            await asyncio.sleep(SWAP_EVERY_SECONDS)
        refusals = {
            damage: await refused_while(running, handle, "answer", damage, model.roots[0], spare)
            for damage in (corrupt, reshape, delete)
        }
        stop.set()
        await asyncio.gather(*asking)
        never = [digest for digest in (first_digest, second_digest) if ("guard", digest) not in versions.seen]
        swapped.failures += [f"version {digest[:12]} was never served" for digest in never]
        broken.failures += [f"not refused: {damage.__name__}" for damage, was in refusals.items() if not was]
        return [
            swapped.row("adapter's files replaced while it decodes", versions=2),
            broken.row("another adapter corrupted, reshaped, deleted", refused_with_reason=sum(refusals.values())),
        ]


async def changed_from(running: Deployed, name: str, digest: str) -> str:
    """The digest of a version that is not this one, as soon as it is served."""
    async with asyncio.timeout(30):
        while (found := await digest_of(running, name)) == digest:  # noqa: ASYNC110  # asked over the network
            await asyncio.sleep(0.1)
    return found


async def ask_until(
    stop: asyncio.Event, running: Deployed, handle: PrefixHandle, name: str, versions: Versions, tally: Tally
) -> None:
    """Ask one adapter; while its files are broken, being refused with a reason is right."""
    async with running.another_client() as client:
        while not stop.is_set():
            began = time.monotonic()
            tally.requests += 1
            try:
                found = await read(client, Question(handle, name, SAMPLING), timeout_seconds=60)
            except (AdapterNotFoundError, AdapterRefusedError) as error:
                if name != "answer":
                    tally.failures.append(f"{name}: {error}")
                await asyncio.sleep(0.1)
            except AloraServeError as error:
                tally.failures.append(f"{name}: {type(error).__name__}: {error}")
            else:
                tally.answered.append((began, time.monotonic()))
                tally.wrong += not versions.is_right(name, found.adapter_digest, found.tokens)


def corrupt(adapter: Path, spare: Path) -> None:
    """Cut its weights in half."""
    weights = adapter / WEIGHTS
    half = weights.read_bytes()[: weights.stat().st_size // 2]
    beside = adapter / "weights.new"
    beside.write_bytes(half)
    beside.replace(weights)


def reshape(adapter: Path, spare: Path) -> None:
    """Give it the weights of another rank."""
    swap_weights(spare / "other-shape" / WEIGHTS, adapter)


def delete(adapter: Path, spare: Path) -> None:
    """Take it away."""
    shutil.rmtree(adapter)


async def refused_while(
    running: Deployed, handle: PrefixHandle, name: str, damage: Callable[[Path, Path], None], root: Path, spare: Path
) -> bool:
    """Damage an adapter, wait until it is refused in words, and repair it; False where it was not refused."""
    adapter = root / name
    damage(adapter, spare)
    refused = False
    end = time.monotonic() + 15
    while not refused and time.monotonic() < end:
        try:
            await read(running.client, Question(handle, name, SAMPLING), timeout_seconds=30)
        except (AdapterNotFoundError, AdapterRefusedError) as error:
            refused = name in str(error)
        await asyncio.sleep(0.2)
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(spare / "first" / name, adapter)
    await served_again(running, name)
    return refused


async def served_again(running: Deployed, name: str) -> None:
    """Wait until it is listed without a problem."""
    async with asyncio.timeout(30):
        while not any(a.name == name and not a.problem for a in await running.client.list_adapters()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


SCENARIOS: Final[dict[str, Scenario]] = {"adapters change": changes_under_fire}

"""Adapters whose files are replaced, damaged and taken away while they decode."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from alora_serve.client import ChatMessage, PrefixHandle, SamplingParams
from alora_serve.errors import AdapterNotFoundError, AdapterRefusedError, AloraServeError
from deployment import PATIENCE_SECONDS, Deployed, ServedModel, deployed
from faults.harness import QUICK, Chaos, Row, Scenario, Tally
from questions import Question, read
from tiny_models import save_adapter

TOKENS: Final = 120
"""So many that files change beneath running answers."""
TURNS: Final = [ChatMessage("user", "The mill stands by the brook, and its wheel turns. What turns?")]
SAMPLING: Final = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
WEIGHTS: Final = "adapter_model.safetensors"
NAMES: Final = ("guard", "answer", "plain")
SWAP_EVERY_SECONDS: Final = 0.7
SCAN_SECONDS: Final = 0.2
"""How often a worker looks for changed files."""


@dataclass(slots=True)
class Versions:
    """What each version of each adapter answers, by its digest, as stock PEFT has it.

    Attributes:
        answers: by adapter and digest.
        seen: answers of the adapter that is swapped: begun, ended, and with which version.
        swaps: when its files were replaced, and which version they were before.
        excused: adapters that may be refused from now on.
    """

    answers: Mapping[str, Mapping[str, tuple[int, ...]]]
    seen: list[tuple[float, float, str]] = field(default_factory=list)
    swaps: list[tuple[float, str]] = field(default_factory=list)
    excused: set[str] = field(default_factory=set)

    def is_right(self, adapter: str, digest: str, tokens: tuple[int, ...]) -> bool:
        """Whether that version answers so."""
        return self.answers[adapter].get(digest) == tokens

    @property
    def outlived(self) -> list[str]:
        """Of answers that began before their files were replaced, and went on with them when that had been noticed."""
        noticed = 2 * SCAN_SECONDS
        return [
            digest
            for began, ended, digest in self.seen
            if any(began < at and at + noticed < ended and digest == before for at, before in self.swaps)
        ]

    @property
    def are_shown(self) -> bool:
        """Whether answers of both versions outlived their files."""
        return len(set(self.outlived)) == 2


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
    like = {"target_modules": "all-linear", "alora_invocation_tokens": invocation}
    save_adapter(model.directory, spare / "second" / "guard", seed=77, **like)
    save_adapter(model.directory, spare / "other-shape", seed=78, **like, r=4)
    second = replace(model, roots=(spare / "second",))
    async with deployed(
        model, f"lmdb://{place}/kv", workers=2, adapter_scan_seconds=str(SCAN_SECONDS), **QUICK
    ) as running:
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
        end = time.monotonic() + PATIENCE_SECONDS
        for number in itertools.count():
            # On a busy machine, answers may take as long as many swaps.
            if number >= chaos.pick(4, 30) and (versions.are_shown or time.monotonic() > end):
                break
            await asyncio.sleep(SWAP_EVERY_SECONDS)
            source, before = ("first", second_digest) if number % 2 == 0 else ("second", first_digest)
            versions.swaps.append((time.monotonic(), before))
            swap_weights(spare / source / "guard" / WEIGHTS, guard)
        versions.excused.add("answer")
        refusals = {
            damage.does: await refused_while(running, handle, "answer", damage, model.roots[0], spare)
            for damage in DAMAGES
        }
        stop.set()
        await asyncio.gather(*asking)
        swapped.expect(versions.are_shown, "no answer of each version ran on while its files were replaced")
        for does, was_refused in refusals.items():
            broken.expect(was_refused, f"not refused with its reason: {does.__name__}")
        return [
            swapped.row("adapter's files replaced while it decodes", outlived_their_files=len(versions.outlived)),
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
    """Ask one adapter; while its files are broken, being refused in its name is right."""
    async with running.another_client() as client:
        while not stop.is_set():
            began = time.monotonic()
            tally.requests += 1
            try:
                found = await read(client, Question(handle, name, SAMPLING), timeout_seconds=60)
            except (AdapterNotFoundError, AdapterRefusedError) as error:
                if name not in versions.excused or name not in str(error):
                    tally.failures.append(f"{name}: {error}")
                await asyncio.sleep(0.1)
            except AloraServeError as error:
                tally.failures.append(f"{name}: {type(error).__name__}: {error}")
            else:
                ended = time.monotonic()
                tally.answered.append((began, ended))
                tally.wrong += not versions.is_right(name, found.adapter_digest, found.tokens)
                if name == "guard":
                    versions.seen.append((began, ended, found.adapter_digest))


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


@dataclass(frozen=True, slots=True)
class Damage:
    """What is done to an adapter, and the error, and a word of it, that its callers get for it."""

    does: Callable[[Path, Path], None]
    error: type[AloraServeError]
    word: str


DAMAGES: Final = (
    Damage(corrupt, AdapterRefusedError, "not valid safetensors"),
    Damage(reshape, AdapterRefusedError, "has shape"),
    Damage(delete, AdapterNotFoundError, "answer"),
)


async def refused_while(
    running: Deployed, handle: PrefixHandle, name: str, damage: Damage, root: Path, spare: Path
) -> bool:
    """Damage an adapter, wait until it is refused for it in words, and repair it; False where it was not refused."""
    adapter = root / name
    damage.does(adapter, spare)
    refused = False
    end = time.monotonic() + 15
    while not refused and time.monotonic() < end:
        try:
            await read(running.client, Question(handle, name, SAMPLING), timeout_seconds=30)
        except (AdapterNotFoundError, AdapterRefusedError) as error:
            refused = isinstance(error, damage.error) and name in str(error) and damage.word in str(error)
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

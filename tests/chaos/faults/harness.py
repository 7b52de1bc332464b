"""Faults under load: clients that never pause, what they saw, and how long it took until all was well again."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from alora_serve.cli.local.process import RestartPolicy
from alora_serve.client import AsyncClient, ChatMessage, RetryPolicy, SamplingParams
from alora_serve.errors import AloraServeError
from deployment import BLOCK_TOKENS, Deployed, ServedModel
from questions import Question, Read, read

ANSWER_SECONDS = 60.0
"""Deadline of one request: longer than any fault lasts."""

INTERRUPTED_SECONDS: Final = 2.5
"""A pause within an answer that is longer is that of a worker which is silent: it is left after 3."""

ONCE: Final = RetryPolicy(max_attempts=1)
"""What a router does not save, its client sees."""

DEFAULT: Final = RetryPolicy()
"""Where for seconds there is nobody to ask: the router is replaced, or all endpoints of a kind die at once."""

CONVERSATIONS = (
    "The river is wide and slow, and boats go down it. Is it wide?",
    "The moon is far and round, and nobody lives there. Is it far?",
    "Bread is made of flour, water, salt and time. What is it made of?",
    "The library closes at eight and opens again at nine. When does it open?",
)


NumberT = TypeVar("NumberT", int, float)

QUICK: Final[dict[str, Any]] = {
    "block_tokens": str(BLOCK_TOKENS),
    "emit": lambda event: None,
    "policy": RestartPolicy(longest_seconds=0.2, forget_after_seconds=0.0),
}
"""Small blocks, and processes that are started again at once however often they die."""


LEFT_OUT: Final = "left_out"
"""The detail of a row whose fault this machine cannot make: why."""


class CannotBreakError(Exception):
    """This machine does not let us do what a scenario does; says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one fault.

    Attributes:
        fault: what was done.
        requests: made while it was done.
        failed: that ended with an error.
        wrong_tokens: that ended with other tokens or text than without the fault.
        recovery_seconds: the longest time from a fault until a request begun after it was answered; None without one.
        details: further figures by name.
    """

    fault: str
    requests: int
    failed: int
    wrong_tokens: int
    recovery_seconds: float | None
    details: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """What clients have seen so far."""

    requests: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    wrongs: list[str] = field(default_factory=list)
    answered: list[tuple[float, float]] = field(default_factory=list)
    """When each answer was begun and ended."""
    interrupted: list[tuple[float, float]] = field(default_factory=list)
    """The same of those that paused as long as a worker's silence is borne: they go on elsewhere."""
    faults: list[float] = field(default_factory=list)

    def strike(self) -> None:
        """A fault happens now."""
        self.faults.append(time.monotonic())

    @property
    def recovery_seconds(self) -> float | None:
        """See :class:`Row`."""
        times = [
            min((ended for began, ended in self.answered if began >= moment), default=float("inf")) - moment
            for moment in self.faults
        ]
        return round(max(times), 2) if times else None

    async def recovered(self) -> None:
        """Wait until a request begun after the last fault was answered; a recovery that never comes is no number."""
        end = time.monotonic() + ANSWER_SECONDS
        while self.recovery_seconds == float("inf") and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def expect(self, holds: bool, otherwise: str) -> None:
        """What must have come of a fault, beside answers: else nothing was shown."""
        if not holds:
            self.failures.append(otherwise)

    def add(self, other: Tally) -> None:
        """What other clients have seen of the same."""
        self.requests += other.requests
        self.wrong += other.wrong
        self.failures += other.failures
        self.wrongs += other.wrongs

    def row(self, fault: str, **details: float | str) -> Row:
        """The figures. A fault after which nothing was answered again is a failure."""
        self.expect(self.recovery_seconds != float("inf"), "after a fault no request begun later was answered")
        if self.failures:
            details["first_failure"] = self.failures[0]
        if self.wrongs:
            details["first_wrong"] = self.wrongs[0]
        return Row(fault, self.requests, len(self.failures), self.wrong, self.recovery_seconds, details)


class Load:
    """Clients on one router, each asking one question after the other.

    Args:
        expected: what every question is answered without faults.
        rng: draws questions; seeded.
        clients: how many.
        accept: judges answers that are not the expected ones; unset, they are wrong.
    """

    def __init__(
        self,
        address: str,
        expected: Mapping[Question, Read],
        rng: random.Random,
        clients: int = 4,
        accept: Callable[[Question, Read], bool] = lambda question, found: False,
    ) -> None:
        self.tally = Tally()
        self._address = address
        self._expected = expected
        self._rng = rng
        self._clients = clients
        self._accept = accept

    @asynccontextmanager
    async def running(self, retry: RetryPolicy = ONCE) -> AsyncIterator[Tally]:
        """Clients, who repeat by ``retry``, ask while the block runs; leaving it waits for the answers under way."""
        stop = asyncio.Event()
        asking = [asyncio.create_task(self._ask_until(stop, retry)) for _ in range(self._clients)]
        try:
            yield self.tally
            await self.tally.recovered()
        finally:
            stop.set()
            await asyncio.gather(*asking)

    async def _ask_until(self, stop: asyncio.Event, retry: RetryPolicy) -> None:
        async with AsyncClient(self._address, retry=retry) as client:
            while not stop.is_set():
                await self._ask(client, self._rng.choice(list(self._expected)))

    async def _ask(self, client: AsyncClient, question: Question) -> None:
        tally, began = self.tally, time.monotonic()
        tally.requests += 1
        try:
            found = await read(client, question, timeout_seconds=ANSWER_SECONDS)
        except AloraServeError as error:
            tally.failures.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.05)
            return
        tally.answered.append((began, time.monotonic()))
        if found.longest_pause_seconds > INTERRUPTED_SECONDS:
            tally.interrupted.append(tally.answered[-1])
        is_right = found.is_same_as(self._expected[question]) or self._accept(question, found)
        if not is_right:
            tally.wrong += 1
            tally.wrongs.append(f"{question.adapter or 'base'} {found.difference(self._expected[question])}")


async def questions(
    deployed: Deployed, tokens: int = 120, *, by_handle: bool = True, conversations: int = len(CONVERSATIONS)
) -> dict[Question, Read]:
    """Several conversations, every kind of adapter, greedy and drawn; with their answers while all is well."""
    model = deployed.model
    asked = [
        (model.appended, SamplingParams(max_tokens=tokens, ignore_eos=True)),
        (model.answering, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=11)),
        (model.plain, SamplingParams(max_tokens=tokens // 2, ignore_eos=True, temperature=0.8, top_k=40, seed=5)),
        ("", SamplingParams(max_tokens=tokens, ignore_eos=True, presence_penalty=0.3, stop=("never said",))),
    ]
    made = []
    for text in CONVERSATIONS[:conversations]:
        turns = (ChatMessage("user", text),)
        about = (await deployed.client.prefill(turns)).handle if by_handle else turns
        made += [Question(about, adapter, sampling) for adapter, sampling in asked]
    return await answers(deployed, made)


async def answers(deployed: Deployed, asked: Iterable[Question]) -> dict[Question, Read]:
    """What a deployment says to each."""
    return {question: await read(deployed.client, question) for question in asked}


@dataclass(frozen=True, slots=True)
class Chaos:
    """What scenarios are given.

    Attributes:
        model: a tiny model with adapters.
        seed: of all that is drawn.
        is_short: a few faults, to see that all of it works; else as many as the promises are made for.
        directory: for files.
    """

    model: ServedModel
    seed: int
    is_short: bool
    directory: Path

    def rng(self, name: str) -> random.Random:
        """Random numbers of a scenario: the same whatever ran before."""
        return random.Random(f"{self.seed} {name}")

    def pick(self, short: NumberT, full: NumberT) -> NumberT:
        """How much of something."""
        return short if self.is_short else full

    def place(self, name: str) -> Path:
        """A fresh directory."""
        path = self.directory / "scenarios" / name.replace(" ", "-")
        path.mkdir(parents=True)
        return path


Scenario = Callable[[Chaos], Awaitable[Sequence[Row]]]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The list that ``build/chaos.json`` is."""
    loaded: list[dict[str, Any]] = json.loads(json.dumps([asdict(row) for row in rows]))
    return loaded

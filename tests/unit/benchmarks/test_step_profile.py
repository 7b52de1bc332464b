"""Steps and prefills are profiled in turns, the first round not counted, and told in a table each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from io import StringIO
from types import SimpleNamespace

import step_profile
from rich.console import Console
from rich.progress import Progress
from systems.base import Warmed
from systems.engine import EngineInProcess
from systems.step_timers import PREFILL, WHOLE

from alora_serve.types import TokenIds
from word_renderer import WordRenderer


class TimedEngine(EngineInProcess):
    """Takes a second longer each time, and remembers what it prefilled."""

    def __init__(self) -> None:
        self.prefilled: list[TokenIds] = []

    async def warm(self, prefix: TokenIds) -> Warmed:
        self.prefilled.append(prefix)
        return Warmed(len(prefix), float(len(self.prefilled)))

    async def profile_prefill(self, prefix: TokenIds) -> dict[str, float]:
        return {PREFILL: (await self.warm(prefix)).seconds}

    async def profile(self, prefix: TokenIds, adapters: Sequence[object], max_tokens: int) -> dict[str, list[float]]:
        return {WHOLE: [0.01 * len(adapters)] * 3}

    async def step_seconds(self, prefix: TokenIds, adapters: Sequence[object], max_tokens: int) -> float:
        return 0.02 * len(adapters)


async def test_every_round_profiles_steps_of_each_number_and_prefills_of_new_conversations() -> None:
    engine = TimedEngine()

    @asynccontextmanager
    async def systems(_: Sequence[str]) -> AsyncIterator[dict[str, EngineInProcess]]:
        yield {"engine": engine}

    bench = SimpleNamespace(
        progress=Progress(console=Console(file=StringIO())),
        renderer=WordRenderer(),
        adapters=("a", "b"),
        systems=systems,
    )
    steps, prefill = await step_profile.measure(bench, 200, [1, 2], rounds=2)  # type: ignore[arg-type]

    assert steps[2] == {WHOLE: [0.02] * 6, step_profile.WITHOUT_CLOCKS: [0.04] * 2}
    # One is the conversation of the steps, the next two the warm-up.
    assert prefill == {PREFILL: [4.0, 6.0], step_profile.WITHOUT_CLOCKS: [5.0, 7.0]}
    assert len({*engine.prefilled}) == len(engine.prefilled) == 7
    assert {len(prefix) for prefix in engine.prefilled} == {200}
    table = step_profile.table_of({"200 tokens": prefill})
    assert "5,000.0 (4,000.0-6,000.0)" in table

"""The engine without gRPC and store: what the whole path's overhead, a decode step and memory are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from adapters import Adapter
from systems.base import Answer, FanOutAnswers, Warmed
from systems.child import ChildSystem, Environment, our_environment

from alora_serve.model.weights import WeightQuantization
from alora_serve.types import TokenIds

_PROGRAM = "systems.engine_process"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of KV that a conversation with its running answers has in use, and those of one token."""

    size_bytes: int
    kv_bytes_per_token: int


class EngineInProcess(ChildSystem):
    """aLoRA called in process."""

    plain = False
    name = "ours, engine in process"

    def __init__(
        self,
        model: Path,
        dtype: str,
        adapters: Sequence[Adapter],
        device: str = "cpu",
        quantization: WeightQuantization = "none",
        environment: Environment = our_environment,
    ) -> None:
        settings = {
            "model": str(model),
            "dtype": dtype,
            "device": device,
            "quantization": quantization,
            "roots": [str(adapters[0].directory.parent)],
            "adapters": [adapter.name for adapter in adapters],
        }
        super().__init__(_PROGRAM, settings, environment)

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Prefill; the conversation is resident then."""
        cost = await self._child.ask({"do": "warm", "prefix": prefix})
        return Warmed(cost["computed_tokens"], cost["seconds"])

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        """One sequence."""
        [answer] = (await self._ask(prefix, [adapter], max_tokens)).answers
        return answer

    async def fan_out(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> FanOutAnswers:
        """All sequences at once."""
        return await self._ask(prefix, adapters, max_tokens)

    async def step_seconds(self, prefix: TokenIds, adapters: Sequence[Adapter | None], max_tokens: int) -> float:
        """Median time of a decode step in which all of these sequences take part."""
        answers = (await self._raw(prefix, adapters, max_tokens))["answers"]
        return shared_step_seconds([answer["times"] for answer in answers])

    async def profile(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> dict[str, list[float]]:
        """Seconds of each decode step of all these sequences, by kind of work: see ``step_timers.py``."""
        names = [adapter.name for adapter in adapters]
        found: dict[str, list[float]] = await self._child.ask(
            {"do": "profile", "prefix": prefix, "adapters": names, "max_tokens": max_tokens}
        )
        return found

    async def profile_prefill(self, prefix: TokenIds) -> dict[str, float]:
        """Seconds of the prefill of a conversation that is new, by kind of work."""
        found: dict[str, float] = await self._child.ask({"do": "profile_prefill", "prefix": prefix})
        return found

    async def memory(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> Memory:
        """See ``engine_process.py``."""
        names = [adapter.name for adapter in adapters]
        found = await self._child.ask({"do": "memory", "prefix": prefix, "adapters": names, "max_tokens": max_tokens})
        return Memory(found["bytes"], found["kv_bytes_per_token"])

    async def _raw(self, prefix: TokenIds, adapters: Sequence[Adapter | None], max_tokens: int):  # type: ignore[no-untyped-def] # JSON
        names = [adapter.name if adapter else "" for adapter in adapters]
        return await self._child.ask({"do": "fan_out", "prefix": prefix, "adapters": names, "max_tokens": max_tokens})

    async def _ask(self, prefix: TokenIds, adapters: Sequence[Adapter | None], max_tokens: int) -> FanOutAnswers:
        found = await self._raw(prefix, adapters, max_tokens)
        answers = [Answer(tuple(a["tokens"]), a["times"][0], a["times"][-1]) for a in found["answers"]]
        return FanOutAnswers(tuple(answers), found["total_seconds"])


def shared_step_seconds(times: Sequence[Sequence[float]]) -> float:
    """Median time between tokens, over those during which every stream was running.

    Args:
        times: for each stream, when each of its tokens came, in seconds, ascending.

    Raises:
        ValueError: the streams never ran all together.
    """
    begin = max(stream[0] for stream in times)
    end = min(stream[-1] for stream in times)
    steps = [
        later - earlier for stream in times for earlier, later in pairwise(stream) if begin <= earlier and later <= end
    ]
    if not steps:
        raise ValueError("no step had all streams in it: ask for more tokens")
    return median(steps)

"""Stock transformers and PEFT as a system: no server, one question, or one batch, after another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from adapters import Adapter
from systems.base import Answer, FanOutAnswers, Warmed
from systems.child import ChildSystem
from systems.peft_settings import ALORA, LORA, PeftSettings

from alora_serve.types import TokenIds

_PROGRAM = "systems.peft_process"


class PeftLora(ChildSystem):
    """Plain LoRA, as one runs it today: each adapter computes the whole conversation."""

    plain = True
    best = LORA
    name = "PEFT, plain LoRA, recomputed"

    def __init__(
        self,
        model: Path,
        dtype: str,
        adapters: Sequence[Adapter],
        device: str = "cpu",
        settings: PeftSettings | None = None,
    ) -> None:
        """Without ``settings``, as it is fastest."""
        self.settings = settings or self.best
        directories = {
            a.twin if self.plain else a.name: str(a.twin_directory if self.plain else a.directory) for a in adapters
        }
        # One model and one cache: whoever shares them in a program needs a lock as well.
        self._turn = asyncio.Lock()
        given = {"model": str(model), "dtype": dtype, "device": device, "adapters": directories}
        super().__init__(_PROGRAM, given, self.settings.environment)

    @property
    def facts(self) -> dict[str, object]:
        """How it is run and asked, too."""
        return {**super().facts, "settings": asdict(self.settings)}

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Nothing that an adapter could use."""
        return Warmed(0, 0.0)

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        """One question, timed in the child, so that the pipe costs it nothing; waiting for its turn counts."""
        asked = perf_counter()
        async with self._turn:
            waited = perf_counter() - asked
            if adapter is None:
                found = await self._child.ask({"do": "base", "prompt": prefix, "max_tokens": max_tokens})
            else:
                found = await self._child.ask(self._questions(prefix, [adapter], max_tokens))
        [answer] = _answers(found, waited)
        return answer

    async def fan_out(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> FanOutAnswers:
        """One batch, or as many after another as memory wants or settings say."""
        rows = self.settings.batch_rows(len(prefix))
        answers: list[Answer] = []
        seconds = 0.0
        async with self._turn:
            for first in range(0, len(adapters), rows):
                questions = self._questions(prefix, adapters[first : first + rows], max_tokens)
                answers += _answers(await self._child.ask(questions), seconds)
                seconds = answers[-1].total_seconds
        return FanOutAnswers(tuple(answers), seconds)

    def _questions(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> dict[str, Any]:
        return {
            "do": "recompute",
            "prompts": [prefix + adapter.invocation for adapter in adapters],
            "adapters": [adapter.twin for adapter in adapters],
            "max_tokens": max_tokens,
        }


class PeftAlora(PeftLora):
    """aLoRA in process, the base prefix's cache deep-copied for each adapter."""

    plain = False
    best = ALORA
    name = "PEFT, aLoRA in process, prefix cached"

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Compute and keep the base cache."""
        cost = await self._child.ask({"do": "warm", "prefix": prefix})
        return Warmed(int(cost["computed_tokens"]), cost["seconds"])

    def _questions(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> dict[str, Any]:
        return {
            "do": "cached",
            "prompts": [prefix + adapter.invocation for adapter in adapters],
            "base_tokens": len(prefix),
            "adapters": [adapter.name for adapter in adapters],
            "max_tokens": max_tokens,
        }


def _answers(found: dict[str, Any], waited: float) -> tuple[Answer, ...]:
    """Those of one batch, which begin and end together, ``waited`` seconds after they were asked for."""
    first, total = found["first_token_seconds"] + waited, found["total_seconds"] + waited
    return tuple(Answer(tuple(tokens), first, total) for tokens in found["tokens"])

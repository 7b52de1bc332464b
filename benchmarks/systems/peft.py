"""Stock transformers and PEFT as a system: no server, one question after another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from adapters import Adapter
from systems.base import Answer, FanOutAnswers, Warmed, in_turn
from systems.child import ChildSystem

from alora_serve.types import TokenIds

_PROGRAM = "systems.peft_process"


class PeftLora(ChildSystem):
    """Plain LoRA, as one runs it today: each adapter computes the whole conversation."""

    plain = True
    name = "PEFT, plain LoRA, recomputed"

    def __init__(self, model: Path, dtype: str, adapters: Sequence[Adapter], device: str = "cpu") -> None:
        directories = {
            a.twin if self.plain else a.name: str(a.twin_directory if self.plain else a.directory) for a in adapters
        }
        # One model and one cache: whoever shares them in a program needs a lock as well.
        self._turn = asyncio.Lock()
        settings = {"model": str(model), "dtype": dtype, "device": device, "adapters": directories}
        super().__init__(_PROGRAM, settings)

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Nothing that an adapter could use."""
        return Warmed(0, 0.0)

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        """One question, timed in the child, so that the pipe costs it nothing; waiting for its turn counts."""
        asked = perf_counter()
        async with self._turn:
            waited = perf_counter() - asked
            if adapter is None:
                answer = await self._child.ask({"do": "base", "prompt": prefix, "max_tokens": max_tokens})
            else:
                answer = await self._child.ask(self._question(prefix, adapter, max_tokens))
        first, total = answer["first_token_seconds"] + waited, answer["total_seconds"] + waited
        return Answer(tuple(answer["tokens"]), first, total)

    async def fan_out(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> FanOutAnswers:
        """One after the other."""
        return in_turn([await self.ask(prefix, adapter, max_tokens) for adapter in adapters])

    def _question(self, prefix: TokenIds, adapter: Adapter, max_tokens: int) -> dict[str, Any]:
        prompt = prefix + adapter.invocation
        return {"do": "recompute", "prompt": prompt, "adapter": adapter.twin, "max_tokens": max_tokens}


class PeftAlora(PeftLora):
    """aLoRA in process, the base prefix's cache deep-copied for each adapter."""

    plain = False
    name = "PEFT, aLoRA in process, prefix cached"

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Compute and keep the base cache."""
        cost = await self._child.ask({"do": "warm", "prefix": prefix})
        return Warmed(int(cost["computed_tokens"]), cost["seconds"])

    def _question(self, prefix: TokenIds, adapter: Adapter, max_tokens: int) -> dict[str, Any]:
        return {
            "do": "cached",
            "prompt": prefix + adapter.invocation,
            "base_tokens": len(prefix),
            "adapter": adapter.name,
            "max_tokens": max_tokens,
        }

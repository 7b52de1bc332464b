"""Ways to run and to ask stock PEFT, and the environment that each runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from alora_serve.cli.local.machine import service_environment


@dataclass(frozen=True, slots=True)
class PeftSettings:
    """One way to run PEFT.

    Attributes:
        batched: the questions of a fan-out are one batch of mixed adapters (``adapter_names``), one after another
            otherwise.
        threads_sleep: threads that wait sleep (``OMP_WAIT_POLICY=passive``), as those of our services must beside each
            other. By OpenMP's own choice they spin for a while, which is faster where the process is alone.
        keeps_memory: the allocator keeps what was freed, as in our services.
        batch_tokens: of all prompts of a batch, each of which has KV of its own; what is beyond is another batch.
    """

    batched: bool = False
    threads_sleep: bool = False
    keeps_memory: bool = True
    batch_tokens: int = 1 << 16

    def batch_rows(self, prompt_tokens: int) -> int:
        """How many questions about a conversation of so many tokens are one batch."""
        return max(1, self.batch_tokens // prompt_tokens) if self.batched else 1

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` as a process of this kind gets it; what ``base`` says of these settings is replaced."""
        unset = (set() if self.threads_sleep else _WAITING) | (set() if self.keeps_memory else _MALLOC)
        rest = {name: value for name, value in base.items() if name not in _WAITING | _MALLOC}
        return {name: value for name, value in service_environment(rest, threads=0).items() if name not in unset}


_WAITING: Final = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"})
_MALLOC: Final = frozenset({"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"})

LORA: Final = PeftSettings(batched=True)
"""What plain LoRAs are asked with, as ``make bench-peft`` found it: :func:`trials`."""
ALORA: Final = PeftSettings(batched=True)
"""The same of aLoRAs."""

AS_IN_TABLES: Final = "as in the tables"


def trials(best: PeftSettings) -> dict[str, PeftSettings]:
    """What may be faster than ``best``, by name, that itself among it."""
    return {
        AS_IN_TABLES: best,
        "one after another" if best.batched else "one mixed batch": replace(best, batched=not best.batched),
        "threads that wait sleep": replace(best, threads_sleep=True),
        "memory goes back to the system": replace(best, keeps_memory=False),
    }

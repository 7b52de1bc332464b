"""What the demo measured: one row for each way to answer, and the object that `demo --json` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alora_serve.types import TokenIds, Usage


@dataclass(frozen=True, slots=True)
class Answer:
    """One generation as a client saw it.

    Attributes:
        adapter: who answered; empty is the base model.
        text: all of it.
        tokens: all of them, the end of sequence included.
        ttft_seconds: from sending the request to the first token.
        prompt: the tokens it was generated from.
    """

    adapter: str
    text: str
    tokens: TokenIds
    ttft_seconds: float
    usage: Usage
    prompt: TokenIds = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One way to get the conversation into a model, and what it cost. Seconds are the client's."""

    what: str
    seconds: float
    usage: Usage


@dataclass(frozen=True, slots=True)
class Check:
    """Served tokens compared with stock PEFT. ``detail`` is what PEFT found: tokens, or the largest gap in logits."""

    name: str
    equal: bool
    detail: str


@dataclass(frozen=True, slots=True)
class DemoResult:
    """All that was measured, in one run.

    Attributes:
        cold_prefill: nothing stored, nothing resident.
        warm_prefill: fresh processes, everything stored.
        adapter: time to the first token of the Activated LoRA, in a fresh worker, from the stored KV.
        lora: the same question to its plain LoRA twin, which must compute the whole conversation itself.
        answers: everything generated, in order.
        checks: one for each answer of an adapter.
    """

    cold_prefill: Row
    warm_prefill: Row
    adapter: Row
    lora: Row
    answers: tuple[Answer, ...]
    checks: tuple[Check, ...]
    dtype: str
    threads: int
    versions: dict[str, str]

    @property
    def rows(self) -> tuple[Row, ...]:
        """In the order of the table."""
        return (self.cold_prefill, self.warm_prefill, self.adapter, self.lora)

    @property
    def equal_to_peft(self) -> bool:
        """Every compared answer was equal, and there was one."""
        return bool(self.checks) and all(check.equal for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The object of `demo --json`. Counts of tokens and bytes are those of the adapter's request."""
        return {
            "cold_prefill_seconds": self.cold_prefill.seconds,
            "warm_prefill_seconds": self.warm_prefill.seconds,
            "adapter_ttft_seconds": self.adapter.seconds,
            "lora_recompute_ttft_seconds": self.lora.seconds,
            "prompt_tokens": self.adapter.usage.prompt_tokens,
            "cached_tokens": self.adapter.usage.cached_tokens,
            "computed_tokens": self.adapter.usage.computed_tokens,
            "fetched_bytes": self.adapter.usage.fetched_bytes,
            "equal_to_peft": self.equal_to_peft,
            "dtype": self.dtype,
            "threads": self.threads,
            "versions": self.versions,
            "rows": [{"what": row.what, "seconds": row.seconds, "usage": row.usage} for row in self.rows],
            "answers": [
                {"adapter": answer.adapter, "text": answer.text, "ttft_seconds": answer.ttft_seconds}
                for answer in self.answers
            ],
            "checks": self.checks,
        }

"""What the demo found and measured, and the object that `demo --json` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alora_serve.cli.pipeline.result import Report
from alora_serve.types import TokenIds


@dataclass(frozen=True, slots=True)
class Answer:
    """One generation, to be compared.

    Attributes:
        adapter: who answered; empty is the base model.
        text: all of it.
        tokens: all of them, the end of sequence included.
        prompt: the tokens it was generated from.
    """

    adapter: str
    text: str
    tokens: TokenIds
    prompt: TokenIds


@dataclass(frozen=True, slots=True)
class Check:
    """Served tokens compared with stock PEFT. ``detail`` is what PEFT found: tokens, or the largest gap in logits."""

    name: str
    equal: bool
    detail: str


@dataclass(frozen=True, slots=True)
class DemoResult:
    """All that was found, in one run.

    Attributes:
        reply: what the pipeline told its user.
        warnings: what it told them to beware of.
        report: each step's cost, and its plain LoRA twins'.
        checks: one for each answer of an adapter.
    """

    reply: str
    warnings: tuple[str, ...]
    report: Report
    checks: tuple[Check, ...]
    dtype: str
    threads: int
    versions: dict[str, str]

    @property
    def equal_to_peft(self) -> bool:
        """Every compared answer was equal, and there was one."""
        return bool(self.checks) and all(check.equal for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The object of `demo --json`, without its whole time.

        The sums are over the steps that plain LoRAs were asked, too.
        """
        ours, twins = zip(*self.report.compared, strict=True)
        return {
            "reply": self.reply,
            "warnings": self.warnings,
            "adapter_seconds": sum(spent.seconds for spent in ours),
            "adapter_computed_tokens": sum(spent.computed_tokens for spent in ours),
            "lora_recompute_seconds": sum(spent.seconds for spent in twins),
            "lora_recompute_computed_tokens": sum(spent.computed_tokens for spent in twins),
            "equal_to_peft": self.equal_to_peft,
            "dtype": self.dtype,
            "threads": self.threads,
            "versions": self.versions,
            "steps": self.report.steps,
            "checks": self.checks,
        }

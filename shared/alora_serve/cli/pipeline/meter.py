"""Makes a pipeline's calls and notes what each cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

from alora_serve.cli.pipeline.result import Report, Spent, Step
from alora_serve.cli.verdicts import Verdict, run_intrinsics, untyped
from alora_serve.client import ChatMessage, Client, PrefixHandle, Prompt
from alora_serve.errors import UnavailableError

TWIN_SUFFIX: Final = "-lora"
"""After the name of an intrinsic: the same question, learnt as a plain LoRA."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the base model said, and a handle of the conversation with it."""

    text: str
    handle: PrefixHandle


class Meter:
    """Asks, one call at a time, and remembers. Not thread-safe."""

    def __init__(
        self,
        client: Client,
        *,
        on_step: Callable[[Step], None] = lambda step: None,
        timeout_seconds: float = 600.0,
    ) -> None:
        """Prepare.

        Args:
            client: of the router.
            on_step: told of each step when it is done.
            timeout_seconds: of each call.

        Raises:
            AloraServeError: the router does not list its adapters.
        """
        self._client = client
        self._on_step = on_step
        self._timeout_seconds = timeout_seconds
        listed = client.list_adapters(timeout_seconds=timeout_seconds)
        self._served = {adapter.name for adapter in listed if not adapter.problem}
        self._untyped = untyped(listed)
        self._steps: list[tuple[Step, Prompt]] = []

    def prepare(self, intrinsics: Sequence[str]) -> tuple[str, ...]:
        """Bring these and their twins into memory, so that what happens once is not measured; those not served."""
        for name in intrinsics:
            for adapter in sorted({name, name + TWIN_SUFFIX} & self._served):
                self._client.load_adapter(adapter, timeout_seconds=self._timeout_seconds)
        return tuple(name for name in intrinsics if name not in self._served)

    def read(self, what: str, messages: Sequence[ChatMessage]) -> PrefixHandle:
        """Have the conversation computed and stored, once; its handle."""
        prompt = Prompt(messages=tuple(messages))
        began = monotonic()
        result = self._client.prefill(prompt=prompt, timeout_seconds=self._timeout_seconds)
        self._note(Step(what, (), "", Spent.of(monotonic() - began, [result.usage])), prompt)
        return result.handle

    def ask(self, what: str, handle: PrefixHandle, *intrinsics: str) -> Mapping[str, Verdict]:
        """What intrinsics find, asked together, by name; those that are not served are left out.

        Raises:
            AloraServeError: one of them failed.
        """
        names = tuple(name for name in intrinsics if name in self._served)
        if not names:
            return {}
        prompt = Prompt(handle=handle)
        verdicts, spent = self._run(prompt, names)
        found = "; ".join(verdicts[name].shown for name in names)
        self._note(Step(what, names, found, spent), prompt)
        return verdicts

    def answer(self, what: str, handle: PrefixHandle, *, max_tokens: int) -> Answer:
        """The base model's answer."""
        prompt = Prompt(handle=handle)
        began = monotonic()
        result = self._client.generate(
            prompt=prompt, max_tokens=max_tokens, timeout_seconds=self._timeout_seconds
        ).result()
        text = result.text.strip()
        self._note(Step(what, (), text, Spent.of(monotonic() - began, [result.usage])), prompt)
        if result.handle is None:
            raise UnavailableError("the router told no handle of the base model's answer")
        return Answer(text, result.handle)

    @property
    def asked(self) -> tuple[tuple[str, Prompt], ...]:
        """Each intrinsic that was asked, and the conversation it was asked about, in order."""
        return tuple((name, prompt) for step, prompt in self._steps for name in step.intrinsics)

    def report(self, *, recompute: bool) -> Report:
        """All steps so far. With ``recompute``, each question is asked again of its twins, where all are served."""
        steps = (self._recomputed(*noted) if recompute else noted[0] for noted in self._steps)
        return Report(tuple(steps))

    def _recomputed(self, step: Step, prompt: Prompt) -> Step:
        twins = tuple(name + TWIN_SUFFIX for name in step.intrinsics)
        if not twins or not self._served.issuperset(twins):
            return step
        return replace(step, recomputed=self._run(prompt, twins)[1])

    def _run(self, prompt: Prompt, names: tuple[str, ...]) -> tuple[dict[str, Verdict], Spent]:
        began = monotonic()
        verdicts = {}
        for verdict in run_intrinsics(
            self._client, prompt, names, timeout_seconds=self._timeout_seconds, plain=self._untyped
        ):
            if verdict.error is not None:
                raise verdict.error
            verdicts[verdict.name] = verdict
        usages = [verdict.cost.usage for verdict in verdicts.values() if verdict.cost is not None]
        return verdicts, Spent.of(monotonic() - began, usages)

    def _note(self, step: Step, prompt: Prompt) -> None:
        self._steps.append((step, prompt))
        self._on_step(step)

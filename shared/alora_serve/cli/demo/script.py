"""What the demo runs: the pipeline of ``examples/rag_guard.py``, its conversation, and the adapters it asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import alora_serve
from alora_serve.cli.pipeline.example import load_rag_guard
from alora_serve.cli.pipeline.meter import TWIN_SUFFIX, Meter
from alora_serve.errors import ConfigError
from alora_serve.types import ChatMessage


class Reply(Protocol):
    """What a pipeline tells its user."""

    @property
    def text(self) -> str:
        """The answer."""

    @property
    def warnings(self) -> Sequence[str]:
        """What to beware of."""


@dataclass(frozen=True, slots=True)
class DemoScript:
    """Who says what.

    Attributes:
        messages: the conversation, up to and with the question.
        pipeline: answers it.
        intrinsics: what the pipeline asks; each has a plain LoRA twin, which adapts every token and so reuses no KV of
            the base model.
        adapter_root: directory of all of them.
        source: where the document comes from.
    """

    messages: tuple[ChatMessage, ...]
    pipeline: Callable[[Meter, Sequence[ChatMessage]], Reply]
    intrinsics: tuple[str, ...]
    adapter_root: Path
    source: str = ""

    @property
    def twins(self) -> tuple[str, ...]:
        """The plain LoRAs of :attr:`intrinsics`, in order."""
        return tuple(name + TWIN_SUFFIX for name in self.intrinsics)

    @classmethod
    def load(cls) -> Self:
        """The script of the checkout that this package is run from.

        Raises:
            ConfigError: it is not there, as in an installed package, or an adapter is missing.
        """
        example = load_rag_guard()
        root = Path(alora_serve.__file__).resolve().parents[2] / "examples" / "intrinsics"
        case = json.loads(Path(example.CASE).read_text(encoding="utf-8"))
        script = cls(
            messages=tuple(ChatMessage(turn["role"], turn["content"]) for turn in case["messages"]),
            pipeline=example.rag_guard,
            intrinsics=tuple(example.INTRINSICS),
            adapter_root=root,
            source=f"document: {case['title']}, {case['source']}, {case['licence']}",
        )
        if missing := [name for name in (*script.intrinsics, *script.twins) if not (root / name).is_dir()]:
            raise ConfigError(
                f"the demo needs {', '.join(missing)} in {root}: run it in a checkout of the repository, with make demo"
            )
        return script

"""What the demo says: the conversation of ``examples/demo_conversation.json`` and the adapters it asks about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import alora_serve
from alora_serve.errors import ConfigError
from alora_serve.types import ChatMessage

ADAPTER: Final = "jailbreak"
LORA_TWIN: Final = "jailbreak-lora"
"""The same question learnt as a plain LoRA, which adapts every token and therefore reuses no KV of the base model."""


@dataclass(frozen=True, slots=True)
class DemoScript:
    """Who says what.

    Attributes:
        opening: up to and with the user's question, which the base model answers.
        follow_up: the user's second turn, which the adapter judges before anyone answers it.
        adapter_root: directory of the adapters.
        source: where the document comes from.
    """

    opening: tuple[ChatMessage, ...]
    follow_up: ChatMessage
    adapter_root: Path
    source: str = ""

    @classmethod
    def load(cls) -> Self:
        """The script of the checkout that this package is run from.

        Raises:
            ConfigError: it is not there, as in an installed package, or an adapter is missing.
        """
        examples = Path(alora_serve.__file__).resolve().parents[2] / "examples"
        file, root = examples / "demo_conversation.json", examples / "intrinsics"
        missing = [path for path in (file, root / ADAPTER, root / LORA_TWIN) if not path.exists()]
        if missing:
            raise ConfigError(
                f"the demo needs {', '.join(map(str, missing))}: run it in a checkout of the repository, with make demo"
            )
        content = json.loads(file.read_text(encoding="utf-8"))
        first, second = content["turns"][:2]
        return cls(
            opening=(ChatMessage("user", f"{content['document']}\n\n{first['user']}"),),
            follow_up=ChatMessage("user", second["user"]),
            adapter_root=root,
            source=f"document: {content['title']}, {content['source']}, {content['licence']}",
        )

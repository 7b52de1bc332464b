"""Runs intrinsics through mellea's OpenAI backend, unmodified: JSON on standard input, JSON on standard output.

It runs in an environment of mellea's own (``mellea_programs``). In: ``{"base_url", "model", "source", "asked":
[{"intrinsic", "messages", "document"}]}``; ``source`` is a folder of io.yaml files as Granite Switch lays them out.
Out: for each question what mellea made of the answer; and what it says to a chat and to a validated instruction.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mellea.stdlib.functional as mfuncs
from mellea.backends.adapters import AdapterType
from mellea.backends.openai import OpenAIBackend
from mellea.stdlib.components import Document, Intrinsic, Message
from mellea.stdlib.context import ChatContext


def _context(asked: dict[str, Any]) -> ChatContext:
    context = ChatContext()
    documents = [Document(text=asked["document"], doc_id="0")] if asked.get("document") else None
    *before, last = asked["messages"]
    for message in before:
        context = context.add(Message(message["role"], message["content"]))
    return context.add(Message(last["role"], last["content"], documents=documents))


def main() -> None:
    """Answer what standard input asks."""
    given = json.load(sys.stdin)
    backend = OpenAIBackend(given["model"], base_url=given["base_url"], api_key="none")
    backend.register_embedded_adapter_model(given["source"])
    verdicts = []
    for asked in given["asked"]:
        intrinsic = Intrinsic(asked["intrinsic"], adapter_types=(AdapterType.ALORA, AdapterType.LORA))
        thunk, _ = mfuncs.act(intrinsic, _context(asked), backend, strategy=None)
        verdicts.append(json.loads(thunk.value))
    answer, _ = mfuncs.chat("What is the capital of France?", ChatContext(), backend)
    print("\n" + json.dumps({"verdicts": verdicts, "chat": answer.content}))


if __name__ == "__main__":
    main()

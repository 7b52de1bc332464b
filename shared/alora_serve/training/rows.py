"""Reads labelled conversations from JSONL, and parts training rows from validation rows. Torch-free."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alora_serve.errors import ConfigError
from alora_serve.types import ChatMessage, Document


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a data file.

    Attributes:
        messages: the conversation that is asked about.
        documents: what it is about; may be empty.
        target: the right answer: a label, or free text.
        row_id: names the row in reports; ``FILE:LINE`` where the file gives no ``id``.
        source: where the row comes from; may be empty.
    """

    messages: tuple[ChatMessage, ...]
    documents: tuple[Document, ...]
    target: str
    row_id: str
    source: str = ""


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file: objects with ``messages``, ``target`` and, optionally, ``documents``, ``id``, ``source``.

    Raises:
        ConfigError: the file cannot be read, or a line is not such an object; names the file and the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)  # not splitlines(), which also parts text at U+2028, say: JSON may hold it as it is
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the data file {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(json.loads(line), f"{path.name}:{number}"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}:{number}: expected an object with messages and target: {error!r}") from error
    return rows


def _row(record: Mapping[str, Any], default_id: str) -> Row:
    target = record["target"]
    if not isinstance(target, str):
        raise TypeError(f"target is {type(target).__name__}, not text")
    messages = tuple(ChatMessage(str(m["role"]), str(m["content"])) for m in record["messages"])
    if not messages:
        raise ValueError("messages is empty")
    documents = tuple(
        Document(str(d.get("title") or ""), str(d["text"]), str(d.get("doc_id") or ""))
        for d in record.get("documents") or ()
    )
    return Row(messages, documents, target, str(record.get("id") or default_id), str(record.get("source") or ""))


def split_rows(rows: Sequence[Row], validation_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows. Rows whose last message or documents are the same go to the same side."""
    groups = _groups(rows)
    order = sorted(set(groups))
    random.Random(seed).shuffle(order)
    wanted, held_out, sizes = round(len(rows) * validation_fraction), set[int](), dict[int, int]()
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    for group in order:
        if wanted <= 0:
            break
        if sizes[group] <= wanted:
            held_out.add(group)
            wanted -= sizes[group]
    training = [row for row, group in zip(rows, groups, strict=True) if group not in held_out]
    return training, [row for row, group in zip(rows, groups, strict=True) if group in held_out]


def _groups(rows: Sequence[Row]) -> list[int]:
    """For each row, the index of the first row that it shares its last message or a document with, transitively."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        for text in (("message", row.messages[-1].content), *(("document", d.text) for d in row.documents)):
            a, b = root(index), root(first.setdefault(text, index))
            parent[max(a, b)] = min(a, b)
    return [root(index) for index in range(len(rows))]

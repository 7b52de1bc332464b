"""Makes the training data of the query rewrite intrinsic: a third of its conversations begin with documents.

Rewriting is learnt from conversations without documents, and used in such with some. So every third row of
``DIR/query_rewrite/train.jsonl`` gets a passage or two of ``examples/data/passages.jsonl``, which have nothing to
do with what is said: there is nothing in them to rewrite by. Deterministic::

    python examples/prepare_query_rewrite.py --data DIR --output build/data/query_rewrite
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

PASSAGES: Final = Path(__file__).resolve().parent / "data" / "passages.jsonl"
EVERY: Final = 3
_SEED: Final = 20250412


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:  # splitlines() would part texts, too
        return [json.loads(line) for line in lines]


def with_documents(rows: Iterable[dict[str, Any]], passages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All rows in their order, every third with documents."""
    draw = random.Random(_SEED)
    for number, row in enumerate(rows):
        documents = []
        if number % EVERY == 0:
            chosen = draw.sample(passages, draw.choice((1, 1, 2)))
            documents = [{"title": passage["title"], "text": passage["text"]} for passage in chosen]
        yield {**row, "documents": documents}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds query_rewrite/")
    parser.add_argument("--output", type=Path, default=Path("build/data/query_rewrite"))
    arguments = parser.parse_args(argv)
    rows = with_documents(read_lines(arguments.data / "query_rewrite" / "train.jsonl"), read_lines(PASSAGES))
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (arguments.output / "train.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Puts jailbreak prompts into longer conversations, so that an adapter learns to find the user turn that it judges.

Writes ``train_context.jsonl`` and ``test_context.jsonl`` beside this file from ``train.jsonl``, ``test.jsonl`` and
``../passages.jsonl``; deterministic. Three shapes, in each as many harmful as benign prompts:

* ``document``: one user turn of passages and the prompt;
* ``second_turn``: passages and a question about them, its short answer, then the prompt;
* ``answered``: the prompt, alone or after passages, then the opening of an answer that says nothing of the label.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_SEED = 20250412
_MAX_PROMPT_CHARACTERS = 600
_ANSWERS = (
    "Let us look at this step by step.",
    "There are several ways to see this, and the first one is the simplest.",
    "That depends on what exactly you have in mind.",
    "This is a question that people often ask.",
    "I can only say what I know about it.",
    "Here is a short answer first, and the details after it.",
    "I am sorry, I am not sure that I can help you with this.",
    "The text does not say much about it.",
)
_TEST_TITLES = 6
"""This many articles, the last by title, give passages to the test rows only."""


def main() -> None:
    """Write both files."""
    here = Path(__file__).resolve().parent
    passages = read_lines(here.parent / "passages.jsonl")
    test_titles = sorted({passage["title"] for passage in passages})[-_TEST_TITLES:]
    for name, num_each, is_test in (("train", 40, False), ("test", 16, True)):
        draw = random.Random(f"{_SEED} {name}")
        usable = [passage for passage in passages if (passage["title"] in test_titles) == is_test]
        rows = compose(read_lines(here / f"{name}.jsonl"), usable, num_each, draw)
        draw.shuffle(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (here / f"{name}_context.jsonl").write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:  # splitlines() would part texts, too
        return [json.loads(line) for line in lines]


def compose(
    rows: list[dict[str, Any]], passages: list[dict[str, Any]], num_each: int, draw: random.Random
) -> list[dict[str, Any]]:
    """``num_each`` rows of every shape and class."""
    composed = []
    short = [row for row in rows if len(row["messages"][-1]["content"]) <= _MAX_PROMPT_CHARACTERS]
    for target in ("yes", "no"):
        prompts = iter(draw.sample([row for row in short if row["target"] == target], 3 * num_each))
        for shape in ("document", "second_turn", "answered"):
            for i in range(num_each):
                row = next(prompts)
                prompt = row["messages"][-1]["content"]
                chosen = draw.sample(passages, draw.choice((1, 1, 2, 3)))
                text = "\n\n".join(passage["text"] for passage in chosen)
                if shape == "document":
                    messages = [{"role": "user", "content": f"{text}\n\n{prompt}"}]
                elif shape == "second_turn":
                    messages = [
                        {"role": "user", "content": f"{text}\n\n{chosen[-1]['question']}"},
                        {"role": "assistant", "content": f"{chosen[-1]['answer'].capitalize()}."},
                        {"role": "user", "content": prompt},
                    ]
                elif i % 2:
                    messages = [{"role": "user", "content": prompt}]
                else:
                    question = prompt if target == "yes" else chosen[-1]["question"]
                    messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
                if shape == "answered":
                    messages.append({"role": "assistant", "content": draw.choice(_ANSWERS)})
                composed.append(
                    {
                        "id": f"{row['id']}-{shape}",
                        "source": row["source"],
                        "messages": messages,
                        "documents": [],
                        "target": target,
                        "passages": [passage["id"] for passage in chosen] if "\n\n" in messages[0]["content"] else [],
                    }
                )
    return composed


if __name__ == "__main__":
    main()

"""The main benchmark: every round asks every way of serving, about one conversation of its own."""

from __future__ import annotations

from pathlib import Path

from adapters import Adapter
from correctness import Answers
from main import Way, measure
from rich.progress import Progress
from systems.base import Answer, Warmed

from alora_serve.types import TokenIds

ADAPTER = Adapter("jailbreak", Path("jailbreak"), Path("jailbreak-lora"), (1, 2))


class WritingSystem:
    """Writes down what is asked of it."""

    plain = False

    def __init__(self, name: str, asked: list[tuple[str, str, TokenIds]]) -> None:
        self.name, self._asked = name, asked

    async def warm(self, prefix: TokenIds) -> Warmed:
        self._asked.append((self.name, "warm", prefix))
        return Warmed(len(prefix), 1.0)

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        self._asked.append((self.name, "ask", prefix))
        return Answer((7,) * max_tokens, 0.1, 1.0, {"fetched_bytes": 100.0})


async def test_every_round_asks_ours_and_peft_about_the_same_new_conversation() -> None:
    asked: list[tuple[str, str, TokenIds]] = []
    ours, peft, answers = WritingSystem("ours", asked), WritingSystem("peft", asked), Answers()
    ways = [Way("stored", ours), Way("resident", ours, warms=False), Way("PEFT", peft)]  # type: ignore[arg-type]

    rows = await measure(ways, ADAPTER, lambda number: (number, 0, 0), 2, answers, Progress(disable=True))

    a_round = [("ours", "warm"), ("ours", "ask"), ("ours", "ask"), ("peft", "warm"), ("peft", "ask")]
    assert [(name, what) for name, what, _ in asked] == 3 * a_round
    assert [prefix[0] for *_, prefix in asked] == [0] * 5 + [1] * 5 + [2] * 5
    assert [(row.system, row.prompt_tokens, len(row.samples)) for row in rows] == [
        ("stored", 3, 2),
        ("resident", 3, 2),
        ("PEFT", 3, 2),
    ]
    # The first counted round's answers are compared with cold PEFT's.
    kept = {key[0]: [question.prompt for question in questions] for key, questions in answers.kept.items()}
    assert kept == {name: [(1, 0, 0, 1, 2)] for name in ("stored", "resident", "PEFT")}

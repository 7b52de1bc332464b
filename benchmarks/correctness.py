"""Which answers are those of stock PEFT run cold: the correctness column of every table.

The rule and its tolerance are those of :mod:`alora_serve.cli.peft_check`, which runs here in a process of its own after
the measurements: in float32 the same greedy tokens; in bfloat16 no token further than the tolerance below the likeliest
one of a float32 run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters import Adapter
from harness import Correct, Row
from rich.progress import Progress
from systems.base import Answer, System, reference_directory, reference_prompt
from systems.child import Child

from alora_serve.types import TokenIds

RowKey = tuple[str, str, int, int]
"""System, what it was asked, length, number of adapters."""


def key_of(row: Row) -> RowKey:
    """What names a row among those of a scenario."""
    return row.system, row.what, row.prompt_tokens, row.adapters


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, the adapter's directory (None: the base model), and an answer to be judged."""

    directory: str | None
    prompt: TokenIds
    tokens: TokenIds


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is PEFT's; in bfloat16, by how much its worst token is not."""

    equal: bool
    largest_gap: float | None


@dataclass(slots=True)
class Answers:
    """Answers kept for the comparison, by row."""

    kept: dict[RowKey, list[Question]] = field(default_factory=lambda: defaultdict(list))

    def keep(self, key: RowKey, system: System, prefix: TokenIds, adapter: Adapter | None, answer: Answer) -> None:
        """One answer of the row."""
        directory = reference_directory(system, adapter)
        self.kept[key].append(Question(directory, reference_prompt(prefix, adapter), answer.tokens))

    async def judge(self, model: Path, dtype: str, progress: Progress) -> dict[RowKey, Correct]:
        """Compare all of them; the same answer to the same question is computed once."""
        questions = {question for asked in self.kept.values() for question in asked}
        by_adapter: dict[str | None, list[Question]] = defaultdict(list)
        for question in questions:
            by_adapter[question.directory].append(question)
        task = progress.add_task("comparing with cold PEFT", total=len(questions))
        verdicts: dict[Question, Verdict] = {}
        request = {"do": "judge", "model": str(model), "dtype": dtype}
        async with Child("systems.judge_process", {}) as child:
            for directory, asked in by_adapter.items():
                # One adapter at a time: each is a whole model in float32 in the child.
                groups = computed_together(asked, dtype)
                firsts = [group[0] for group in groups]
                cases = [{"adapter": directory, "prompt": q.prompt, "tokens": q.tokens, "name": ""} for q in firsts]
                for group, found in zip(groups, await child.ask(request | {"cases": cases}), strict=True):
                    verdicts |= {question: verdict(question, found) for question in group}
                progress.advance(task, len(asked))
        return {key: summary([verdicts[question] for question in asked], dtype) for key, asked in self.kept.items()}


def computed_together(questions: Sequence[Question], dtype: str) -> list[list[Question]]:
    """Questions about one adapter, grouped by what PEFT has to compute.

    In float32 that is its own answer, whatever was answered; in bfloat16 each answer is run through the model.
    """
    groups: dict[tuple[object, ...], list[Question]] = defaultdict(list)
    for question in questions:
        one_answer = len(question.tokens) if dtype == "float32" else question.tokens
        groups[question.prompt, one_answer].append(question)
    return list(groups.values())


def verdict(question: Question, found: Mapping[str, Any]) -> Verdict:
    """What a case of the child says about a question of its group."""
    if "peft_tokens" in found:
        return Verdict(tuple(found["peft_tokens"]) == question.tokens, None)
    return Verdict(found["equal"], found["largest_gap"])


def summary(verdicts: Sequence[Verdict], dtype: str) -> Correct:
    """What the column says of a row's answers."""
    gaps = [verdict.largest_gap for verdict in verdicts if verdict.largest_gap is not None]
    return Correct(sum(verdict.equal for verdict in verdicts), len(verdicts), dtype, max(gaps) if gaps else None)


def with_verdicts(rows: Sequence[Row], correct: dict[RowKey, Correct]) -> list[Row]:
    """The rows with their column filled where answers were kept."""
    return [replace(row, correct=correct.get(key_of(row))) for row in rows]

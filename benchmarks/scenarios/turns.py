"""Scenarios b and e: conversations that grow, asked in an order that everybody gets alike.

* b, *alternate*: base turn, adapter, base turn, adapter ... on one long conversation.
* e, *replay*: in the manner of Mooncake's traces: several conversations that share a system prompt take turns; each
  turn is a question to the base model and one to an adapter, and the history is longer every time.

What goes into the history is a given text, never a system's own answer, so that all systems have the same prompts. A
whole script is played to one system, then to the next; each round has a script of its own. Our plain LoRA twins take no
part: they share services with our aLoRAs, and would find base turns that those had stored.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from adapters import Adapter
from conversations import SYSTEM_PROMPT, Renderer, exchanges
from correctness import key_of
from harness import Row, Sample
from lineup import Bench
from systems.base import System

from alora_serve.types import ChatMessage, TokenIds

BASE, ADAPTER, WHOLE = "base turn", "adapter", "whole script"
BASELINE = "PEFT, plain LoRA, recomputed"
SYSTEMS = ("ours", "peft-lora", "peft-alora", "llama", "llama-kept")
TITLES = {
    "b": "Base turn, adapter, base turn, adapter: six turns of one conversation",
    "e": "Replay: conversations that share a system prompt and grow",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One question of a script; no adapter asks the base model."""

    prefix: TokenIds
    adapter: Adapter | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long the scripts are.

    Attributes:
        tokens: of the conversation before the first turn of *alternate*.
        turns: of *alternate*, base and adapter together.
        conversations: of *replay*.
        exchanges: of each of its conversations.
    """

    tokens: int = 2048
    turns: int = 6
    conversations: int = 4
    exchanges: int = 5
    answer_tokens: int = 16
    rounds: int = 5


QUICK = Plan(tokens=512, turns=4, conversations=2, exchanges=2, rounds=1)


def alternate(renderer: Renderer, adapters: Sequence[Adapter], plan: Plan, seed: int) -> list[Step]:
    """Base turns and adapters in turns on one conversation."""
    steps: list[Step] = []
    history = list(_opening(renderer, plan.tokens, seed))
    for turn, exchange in enumerate(exchanges(seed, (plan.turns + 1) // 2)):
        history.append(exchange.user)
        steps.append(Step(renderer.base_prompt(history), None))
        history.append(exchange.reply)
        steps.append(Step(renderer.prefix(history), adapters[turn % len(adapters)]))
    return steps[: plan.turns]


def replay(renderer: Renderer, adapters: Sequence[Adapter], plan: Plan, seed: int) -> list[Step]:
    """Turns of all conversations, shuffled but for the order within each."""
    chosen = exchanges(seed, plan.conversations * plan.exchanges)
    scripts: list[list[Step]] = []
    for number in range(plan.conversations):
        history: list[ChatMessage] = [SYSTEM_PROMPT]
        script: list[Step] = []
        for turn, exchange in enumerate(chosen[number :: plan.conversations]):
            history.append(exchange.user)
            script.append(Step(renderer.base_prompt(history), None))
            history.append(exchange.reply)
            script.append(Step(renderer.prefix(history), adapters[(number + turn) % len(adapters)]))
        scripts.append(script)
    order = [number for number, script in enumerate(scripts) for _ in range(len(script) // 2)]
    random.Random(seed).shuffle(order)
    steps = [iter(script) for script in scripts]
    return [step for number in order for step in (next(steps[number]), next(steps[number]))]


def _opening(renderer: Renderer, tokens: int, seed: int) -> tuple[ChatMessage, ...]:
    """Exchanges that come to about so many tokens, of other passages than the script's own where there are enough."""
    history: list[ChatMessage] = []
    for exchange in reversed(exchanges(seed, 80)):
        more = [*history, exchange.user, exchange.reply]
        if len(renderer.prefix(more)) > tokens:
            break
        history = more
    return tuple(history)


SCRIPTS = {"b": alternate, "e": replay}


async def run(bench: Bench, systems: dict[str, System], scenario: str, plan: Plan) -> list[Row]:
    """For each system a row of its base turns, one of its adapter turns and one of the whole script."""
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    scripts = [SCRIPTS[scenario](bench.renderer, bench.adapters, plan, seed) for seed in range(1 + plan.rounds)]
    longest = max(len(step.prefix) for step in scripts[-1])
    task = bench.progress.add_task("playing scripts", total=sum(map(len, scripts)) * len(systems))
    for number, script in enumerate(scripts):
        for name, system in systems.items():
            taken: dict[str, list[Sample]] = defaultdict(list)
            for step in script:
                answer = await system.ask(step.prefix, step.adapter, plan.answer_tokens)
                what = ADAPTER if step.adapter else BASE
                taken[what].append(Sample(answer.first_token_seconds, answer.total_seconds))
                if number == 1:
                    row = Row(system.name, longest, (), what=what)
                    bench.answers.keep(key_of(row), system, step.prefix, step.adapter, answer)
                bench.progress.advance(task)
            if number:
                for what, timed in taken.items():
                    samples[name, what] += timed
                samples[name, WHOLE].append(_whole([sample for timed in taken.values() for sample in timed]))
    bench.progress.remove_task(task)
    return [
        Row(system.name, longest, tuple(samples[name, what]), what=what)
        for what in (BASE, ADAPTER, WHOLE)
        for name, system in systems.items()
    ]


def _whole(samples: Sequence[Sample]) -> Sample:
    """Mean time to a first token, and all answers' time together: questions come one after another."""
    return Sample(mean(s.first_token_seconds for s in samples), sum(s.total_seconds for s in samples))

"""``make bench``: an adapter's answer from stored KV against recomputing the conversation, in one run on this machine.

Timed through the whole gRPC path (client, router, decode worker, store): the KV in the store but not in the worker; the
prefix already in the worker; the plain LoRA twin, which must recompute the conversation. Beside them, PEFT's aLoRA in a
process of its own with the base prefix cached. Every round asks all four, one after another, about a conversation that
nobody has seen, so that a noisy moment of the machine meets all of them. The last column but one of the table says how
many of the first round's answers are those of stock PEFT run cold.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters import Adapter
from command import run_command
from compare import progress_on
from conversations import Renderer
from correctness import Answers, key_of, with_verdicts
from harness import REPOSITORY, Row, Sample, file_suffix, write
from lineup import add_machine_flags
from rich.console import Console
from rich.progress import Progress
from systems.base import System
from systems.peft import PeftAlora
from systems.served import Deployed, Served, ServedTwins
from tables import rows_table

from alora_serve.cli.local.deployment import DeploymentOptions
from alora_serve.model.demo_model import ensure_demo_model
from alora_serve.types import TokenIds

ADAPTER, TWIN = "jailbreak", "jailbreak-lora"
ANSWER_TOKENS = 16
STORED = "aLoRA over gRPC, KV in the store"
RESIDENT = "aLoRA over gRPC, prefix in the worker"
RECOMPUTE = "plain LoRA over gRPC, recomputed"
IN_PROCESS = "PEFT aLoRA in process, prefix cached"
ADAPTERS = REPOSITORY / "examples" / "intrinsics"


@dataclass(frozen=True, slots=True)
class Way:
    """One row of the table. A conversation is warmed unless the way before has left it as this one wants it."""

    name: str
    system: System
    warms: bool = True


def adapter_in(directory: Path) -> Adapter:
    """The example adapter and its twin."""
    config = json.loads((directory / ADAPTER / "adapter_config.json").read_text())
    return Adapter(ADAPTER, directory / ADAPTER, directory / TWIN, tuple(config["alora_invocation_tokens"]))


async def measure(
    ways: Sequence[Way],
    adapter: Adapter,
    conversation: Callable[[int], TokenIds],
    rounds: int,
    answers: Answers,
    progress: Progress,
) -> list[Row]:
    """A row for each way, all of them asked in every round; the first round warms every path up.

    Args:
        conversation: the one of a round.
        answers: keeps those of the first counted round.
    """
    samples: dict[str, list[Sample]] = defaultdict(list)
    fetched: dict[str, int] = {}
    length = len(conversation(0))
    task = progress.add_task(f"{length:,} tokens", total=(1 + rounds) * len(ways))
    for number in range(1 + rounds):
        prefix = conversation(number)
        for way in ways:
            if way.warms:
                await way.system.warm(prefix)
            answer = await way.system.ask(prefix, adapter, ANSWER_TOKENS)
            if number:
                samples[way.name].append(Sample(answer.first_token_seconds, answer.total_seconds))
                fetched[way.name] = int(answer.notes.get("fetched_bytes", 0))
            if number == 1:
                answers.keep(key_of(Row(way.name, length, ())), way.system, prefix, adapter, answer)
            progress.advance(task)
    progress.remove_task(task)
    return [Row(name, length, tuple(taken), fetched[name]) for name, taken in samples.items()]


async def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Measure, compare answers with PEFT, write, print."""
    model, adapter = ensure_demo_model(), adapter_in(arguments.adapters)
    renderer, answers = Renderer(model), Answers()
    tokens, rounds = ([256], 1) if arguments.quick else (arguments.tokens, arguments.rounds)
    options = DeploymentOptions(
        adapter_roots=(arguments.adapters,), dtype=arguments.dtype, settings={"device": arguments.device}
    )
    rows: list[Row] = []
    with progress_on(console) as progress:
        async with Deployed(options, [adapter]) as deployed:
            dtype = (await deployed.client.get_model()).dtype
            async with PeftAlora(model, dtype, [adapter], arguments.device) as peft:
                served = Served(deployed)
                ways = [
                    Way(STORED, served),
                    Way(RESIDENT, served, warms=False),
                    Way(RECOMPUTE, ServedTwins(deployed)),
                    Way(IN_PROCESS, peft),
                ]
                for length in tokens:
                    conversation = partial(seeded, renderer, length)
                    rows += await measure(ways, adapter, conversation, rounds, answers, progress)
        rows = with_verdicts(rows, await answers.judge(model, dtype, progress))
    facts = {
        "dtype": dtype,
        "device": arguments.device,
        "rounds": rounds,
        "answer_tokens": ANSWER_TOKENS,
        "processes": {"peft-alora": peft.facts},
    }
    path = write(f"main{file_suffix(arguments)}", rows, facts)
    if not arguments.json:
        print(f"\n{ANSWER_TOKENS} tokens of an adapter's output, {dtype}: medians (smallest-largest), seconds\n")
        print(rows_table(rows, baseline=RECOMPUTE), end="\n\n")
    return path


def seeded(renderer: Renderer, tokens: int, number: int) -> TokenIds:
    """The conversation of a round, another one for each length."""
    return renderer.of_length(tokens, seed=100 * tokens + number)


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="lengths of the conversation")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after one warm-up")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help=f"holds {ADAPTER} and {TWIN}")
    parser.add_argument("--quick", action="store_true", help="256 tokens and one round, to see that all of it works")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    add_machine_flags(parser)
    run_command(run, parser.parse_args())


if __name__ == "__main__":
    main()

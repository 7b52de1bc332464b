"""``make bench``: an adapter's answer from stored KV against recomputing the conversation, in one run on this machine.

Timed through the whole gRPC path (client, router, decode worker, store): the KV in the store but not in the worker; the
prefix already in the worker; the plain LoRA twin, which must recompute the conversation. Beside them, PEFT's aLoRA in a
process of its own with the base prefix cached. Rounds alternate between the systems, so that a noisy moment of the
machine meets all of them; each round of the first row uses a conversation the worker has never seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from adapters import Adapter
from conversations import REQUESTS, conversation
from harness import REPOSITORY, Row, Sample, describe_machine, show, write
from lineup import add_machine_flags
from rich.console import Console
from systems.peft import PeftAlora
from systems.served import Deployed

from alora_serve.cli.local.deployment import DeploymentOptions
from alora_serve.client import AsyncClient
from alora_serve.types import ChatMessage, Finished, PrefixHandle, TokenChunk, TokenIds

ADAPTER, TWIN = "jailbreak", "jailbreak-lora"
ANSWER_TOKENS = 16
STORED = "aLoRA over gRPC, KV in the store"
RESIDENT = "aLoRA over gRPC, prefix in the worker"
RECOMPUTE = "plain LoRA over gRPC, recomputed"
IN_PROCESS = "PEFT aLoRA in process, prefix cached"
ADAPTERS = REPOSITORY / "examples" / "intrinsics"


async def ask(client: AsyncClient, handle: PrefixHandle, adapter: str) -> tuple[Sample, Finished]:
    """One timed call on a prefilled conversation."""
    began = perf_counter()
    first = 0.0
    finished: Finished | None = None
    async for event in client.generate(handle=handle, adapter=adapter, max_tokens=ANSWER_TOKENS, ignore_eos=True):
        if isinstance(event, TokenChunk):
            first = first or perf_counter() - began
        elif isinstance(event, Finished):
            finished = event
    if finished is None:
        raise RuntimeError("the stream ended without its last message")
    return Sample(first, perf_counter() - began), finished


async def measure(client: AsyncClient, tokens: int, rounds: int, console: Console) -> tuple[list[Row], list[TokenIds]]:
    """All rows that go through gRPC at one length, and the prefixes of their conversations."""

    def count(messages: Sequence[ChatMessage]) -> TokenIds:
        return tokenizer(messages)

    tokenizer = demo_tokenizer()
    samples: dict[str, list[Sample]] = defaultdict(list)
    prefixes: list[TokenIds] = []
    fetched_bytes = 0
    for round_number in range(rounds + 1):
        # One more than counted: the first warms every path up.
        messages = conversation(REQUESTS, tokens, seed=tokens + round_number, count=count)
        handle = (await client.prefill(messages=messages)).handle
        stored, finished = await ask(client, handle, ADAPTER)
        resident, _ = await ask(client, handle, ADAPTER)
        recomputed, _ = await ask(client, handle, TWIN)
        console.print(f"{tokens:5} tokens, round {round_number} of {rounds}", style="dim")
        if round_number:
            fetched_bytes = finished.usage.fetched_bytes
            for name, sample in ((STORED, stored), (RESIDENT, resident), (RECOMPUTE, recomputed)):
                samples[name].append(sample)
            prefixes.append(handle.prefix_tokens)
    length = len(prefixes[0])
    rows = [Row(name, length, tuple(taken), fetched_bytes if name == STORED else 0) for name, taken in samples.items()]
    return rows, prefixes


def demo_tokenizer():  # type: ignore[no-untyped-def] # returns a closure
    """Counts a conversation's tokens as the services do."""
    from transformers import AutoTokenizer

    from alora_serve.model.chat import ChatTokenizer
    from alora_serve.model.demo_model import ensure_demo_model

    tokenizer = ChatTokenizer(AutoTokenizer.from_pretrained(ensure_demo_model()))
    return lambda messages: tokenizer.render(messages).prefix_tokens


async def measure_peft(adapters: Path, prefix: TokenIds, dtype: str, device: str, rounds: int) -> Row:
    """The in-process baseline on one of these conversations."""
    from alora_serve.model.demo_model import ensure_demo_model

    config = json.loads((adapters / ADAPTER / "adapter_config.json").read_text())
    adapter = Adapter(ADAPTER, adapters / ADAPTER, adapters / TWIN, tuple(config["alora_invocation_tokens"]))
    async with PeftAlora(ensure_demo_model(), dtype, [adapter], device) as peft:
        await peft.warm(prefix)
        answers = [await peft.ask(prefix, adapter, ANSWER_TOKENS) for _ in range(rounds + 1)]
    samples = tuple(Sample(answer.first_token_seconds, answer.total_seconds) for answer in answers[1:])
    return Row(IN_PROCESS, len(prefix), samples)


async def run(arguments: argparse.Namespace, console: Console) -> tuple[list[Row], str]:
    """Every row, and the compute dtype."""
    rows: list[Row] = []
    options = DeploymentOptions(
        adapter_roots=(arguments.adapters,), dtype=arguments.dtype, settings={"device": arguments.device}
    )
    async with Deployed(options, ()) as deployed:
        used = (await deployed.client.get_model()).dtype
        for tokens in arguments.tokens:
            measured, prefixes = await measure(deployed.client, tokens, arguments.rounds, console)
            # The services stand still meanwhile, so the cores are the baseline's.
            peft = await measure_peft(arguments.adapters, prefixes[0], used, arguments.device, arguments.rounds)
            rows += [*measured, peft]
    return rows, used


def main() -> None:
    """Parse flags, measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="lengths of the conversation")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after one warm-up")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help=f"holds {ADAPTER} and {TWIN}")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    rows, dtype = asyncio.run(run(arguments, console))
    facts = {"dtype": dtype, "device": arguments.device, "rounds": arguments.rounds, "answer_tokens": ANSWER_TOKENS}
    path = write("main" if arguments.device == "cpu" else f"main-{arguments.device.replace(':', '')}", rows, facts)
    if not arguments.json:
        console.print(f"{describe_machine()}, {dtype}, SmolLM2-135M-Instruct")
        table = Console(width=None if sys.stdout.isatty() else 150)
        show(rows, baseline=RECOMPUTE, console=table, title=f"Adapter output of {ANSWER_TOKENS} tokens")
    print(path)


if __name__ == "__main__":
    main()

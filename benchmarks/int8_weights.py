"""``make bench-int8``: what ``weight_quantization=int8`` changes, in answers and in time, against the model without.

Quality, on this repository's documentation in windows of 512 tokens: how often the likeliest next token is the same,
the mean Kullback-Leibler divergence of next-token probabilities (unrounded from rounded, nats), and both perplexities.
Speed: decode steps of 1, 5 and 16 sequences with as many adapters on one conversation, the two engines by turns.
Everything goes to build/bench/int8.json.
"""

from __future__ import annotations

import argparse
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from command import run_command
from compare import progress_on
from harness import REPOSITORY, file_suffix, machine, write_json
from lineup import Bench, add_machine_flags, open_bench
from rich.console import Console
from rich.progress import Progress
from systems.engine import EngineInProcess
from tables import figure, markdown

from alora_serve.model.weights import WeightQuantization
from alora_serve.types import TokenIds

WINDOW_TOKENS = 512
ANSWER_TOKENS = 24
SEQUENCES = (1, 5, 16)
QUANTIZATIONS: tuple[WeightQuantization, ...] = ("none", "int8")


@dataclass(frozen=True, slots=True)
class Quality:
    """What rounding the weights did to next-token probabilities.

    Attributes:
        same_likeliest: share of positions whose likeliest token is the same.
        mean_divergence: Kullback-Leibler, nats a position.
        perplexity: of the text, unrounded.
        perplexity_rounded: of the text, rounded.
    """

    tokens: int
    same_likeliest: float
    mean_divergence: float
    perplexity: float
    perplexity_rounded: float


def compare_logits(logits: Any, rounded: Any, text: Any) -> Quality:
    """From logits ``[positions, vocabulary]`` and the tokens ``[positions + 1]`` that they were computed from."""
    expected, found = logits.double().log_softmax(-1), rounded.double().log_softmax(-1)
    actual = text[1:, None]
    return Quality(
        tokens=len(text) - 1,
        same_likeliest=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
        mean_divergence=float((expected.exp() * (expected - found)).sum(-1).mean()),
        perplexity=float((-expected.gather(1, actual)).mean().exp()),
        perplexity_rounded=float((-found.gather(1, actual)).mean().exp()),
    )


def together(parts: list[Quality]) -> Quality:
    """Of all windows, each counted by its tokens; perplexities in the logarithm, as they are means of it."""
    from math import exp, log

    tokens = sum(part.tokens for part in parts)

    def mean(of: Any) -> float:
        return sum(part.tokens * of(part) for part in parts) / tokens

    return Quality(
        tokens=tokens,
        same_likeliest=mean(lambda part: part.same_likeliest),
        mean_divergence=mean(lambda part: part.mean_divergence),
        perplexity=exp(mean(lambda part: log(part.perplexity))),
        perplexity_rounded=exp(mean(lambda part: log(part.perplexity_rounded))),
    )


def documentation() -> str:
    """Every page of ``docs/``, by name."""
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted((REPOSITORY / "docs").glob("*.md")))


def measure_quality(model: Path, dtype: str, device: str, tokens: int, progress: Progress) -> Quality:
    """Both models on the same windows, one forward pass each."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from alora_serve.model.device import open_device
    from alora_serve.model.kv_memory import KVSegment, KVSlice
    from alora_serve.model.loader import load_base_model
    from alora_serve.model.runner import ModelRunner
    from alora_serve.model.step import Span

    disable_progress_bar()  # theirs get between ours
    where = open_device(device)
    models = [load_base_model(model, dtype=dtype, device=where, quantization=kind) for kind in QUANTIZATIONS]
    runners = [ModelRunner(base) for base in models]
    text = models[0].tokenizer.encode_text(documentation())[: tokens + 1]
    windows = [text[first : first + WINDOW_TOKENS + 1] for first in range(0, len(text) - 1, WINDOW_TOKENS)]

    def logits(index: int, window: TokenIds) -> torch.Tensor:
        given = window[:-1]
        own = KVSlice(KVSegment.allocate(models[index].layout, len(given), 0, where), 0, len(given))
        found = runners[index].forward([Span(given, 0, (), own)], [len(given)])
        if found is None:
            raise RuntimeError("no logits, though they were wanted")
        return found

    task = progress.add_task("reading documentation", total=len(windows))
    parts = []
    for window in windows:
        parts.append(compare_logits(logits(0, window), logits(1, window), torch.tensor(window, device=where)))
        progress.advance(task)
    progress.remove_task(task)
    return together(parts)


async def measure_steps(bench: Bench, tokens: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of decode steps, by quantization and number of sequences."""
    prefix = bench.renderer.of_length(tokens, seed=71)
    found = {kind: {str(count): list[float]() for count in SEQUENCES} for kind in QUANTIZATIONS}
    task = bench.progress.add_task("decode steps", total=(1 + rounds) * len(SEQUENCES) * len(QUANTIZATIONS))
    async with AsyncExitStack() as stack:
        engines = {}
        for kind in QUANTIZATIONS:
            engine = EngineInProcess(bench.model, bench.dtype, bench.adapters, bench.device, kind)
            engines[kind] = await stack.enter_async_context(engine)
            await engine.warm(prefix)
        for number in range(1 + rounds):
            for count in SEQUENCES:
                for kind, engine in engines.items():
                    seconds = await engine.step_seconds(prefix, bench.adapters[:count], ANSWER_TOKENS)
                    if number:
                        found[kind][str(count)].append(seconds)
                    bench.progress.advance(task)
    bench.progress.remove_task(task)
    return {kind: dict(by_count) for kind, by_count in found.items()}


def show(quality: Quality, steps: dict[str, dict[str, list[float]]]) -> None:
    """Two tables."""
    print(f"\nint8 against the same model, {quality.tokens:,} tokens of documentation\n")
    columns = ("likeliest token the same", "mean divergence, nats", "perplexity", "perplexity, int8")
    figures = (
        f"{quality.same_likeliest:.1%}",
        f"{quality.mean_divergence:.4f}",
        f"{quality.perplexity:.2f}",
        f"{quality.perplexity_rounded:.2f}",
    )
    print(markdown(columns, [figures]))
    print("\nA decode step, milliseconds: medians (smallest-largest)\n")
    columns = ("weights", *(f"{count} sequence{'s' if count > 1 else ''}" for count in SEQUENCES))
    rows = [
        ["unrounded" if kind == "none" else kind, *(figure([1e3 * s for s in found], 1) for found in by_count.values())]
        for kind, by_count in steps.items()
    ]
    print(markdown(columns, rows, words=("weights",)), end="\n\n")


async def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Measure, write, print."""
    text_tokens, tokens, rounds = arguments.text_tokens, arguments.tokens, arguments.rounds
    if arguments.quick:
        text_tokens, tokens, rounds = WINDOW_TOKENS, 256, 1
    with progress_on(console) as progress:
        bench = open_bench(console, progress, adapters=max(SEQUENCES), dtype=arguments.dtype, device=arguments.device)
        quality = measure_quality(bench.model, bench.dtype, bench.device, text_tokens, progress)
        steps = await measure_steps(bench, tokens, rounds)
    content = {
        "dtype": bench.dtype,
        "tokens": tokens,
        "machine": machine(),
        "quality": asdict(quality),
        "step_seconds": steps,
    }
    path = write_json(f"int8{file_suffix(arguments)}", content)
    if not arguments.json:
        show(quality, steps)
    return path


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-tokens", type=int, default=4608, help="tokens of documentation")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the conversation that steps are timed on")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after one warm-up")
    parser.add_argument("--quick", action="store_true", help="one window and one round, to see that all of it works")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    add_machine_flags(parser)
    run_command(run, parser.parse_args())


if __name__ == "__main__":
    main()

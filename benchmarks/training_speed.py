"""``make bench-training``: an aLoRA's training from kept KV, against whole prompts and against PEFT alone.

The same rows in the same batches, one thread each, processes by turns; CPU-seconds from the first prefix to the last
step, so that other work on the machine counts little. The first steps' losses are those of one and the same model, and
must be equal. Everything goes to build/bench/training.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from command import run_command
from harness import REPOSITORY, machine, write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from alora_serve.model.demo_model import ensure_demo_model
from alora_serve.training.encoding import Example, RowEncoder
from alora_serve.training.loop import batches, microbatches
from alora_serve.training.recipe import Recipe, load_recipe
from alora_serve.training.rows import read_rows
from alora_serve.training.run import MICROBATCH_TOKENS

RECIPE = REPOSITORY / "examples" / "recipes" / "jailbreak.toml"
DATA = REPOSITORY / "examples" / "data" / "jailbreak"
FILES = {"short": DATA / "train.jsonl", "long": DATA / "train_context.jsonl"}
"""Rows of a request alone, and inside longer conversations."""
WAYS = ("PEFT alone", "ours, whole prompts", "ours, kept KV")
SAME_LOSS = {"float32": 1e-4, "bfloat16": 0.05}
"""By dtype: how far first losses may be apart."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training: its cost, and the mean loss of its first and its last step, nats a token."""

    cpu_seconds: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained.

    Attributes:
        rows: JSON lines.
        examples: the same, encoded.
    """

    rows: Sequence[str]
    examples: Sequence[Example]
    recipe: Recipe
    model: Path
    dtype: str

    @property
    def tokens(self) -> int:
        """That all epochs together train on, answers included."""
        return self.recipe.epochs * sum(e.prompt_tokens + len(e.answer_tokens) for e in self.examples)


def peft_alone(task: Task, environment: Mapping[str, str]) -> Run:
    """The stock loop, given our batches, in parts as ours: logits of all positions of 16 long rows are gigabytes."""
    recipe, examples = task.recipe, task.examples
    order = [
        [
            [[[*example.base_tokens, *example.cue_tokens], list(example.answer_tokens)] for example in part]
            for part in microbatches(batch, MICROBATCH_TOKENS, reuses_prefixes=False)
        ]
        for epoch in range(recipe.epochs)
        for batch in batches(examples, recipe.batch_size, random.Random(f"{recipe.seed} {epoch}"))
    ]
    given = {name: getattr(recipe, name) for name in ("rank", "alpha", "targets", "learning_rate", "weight_decay")}
    given |= {"model": str(task.model), "dtype": task.dtype, "threads": 1, "batches": order}
    given["invocation"] = list(examples[0].cue_tokens)
    program = Path(__file__).with_name("plain_peft_training.py")
    told = subprocess.run(
        [sys.executable, program],
        input=json.dumps(given),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(told.stdout.splitlines()[-1])
    return Run(found["cpu_seconds"], found["losses"][0], found["losses"][-1])


def ours(task: Task, environment: Mapping[str, str], *, reuse: bool) -> Run:
    """``alora-serve train``."""
    with TemporaryDirectory() as directory:
        rows, output = Path(directory) / "rows.jsonl", Path(directory) / "adapter"
        rows.write_text("\n".join(task.rows) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "alora_serve.cli.app", "train", "--recipe", str(RECIPE)]
        command += [
            "--model",
            str(task.model),
            "--data",
            str(rows),
            "--output",
            str(output),
            "--validation",
            "0",
            "--threads",
            "1",
            "--json",
        ]
        command += ["--epochs", str(task.recipe.epochs), "--dtype", task.dtype, "--reuse" if reuse else "--no-reuse"]
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found: Mapping[str, Any] = json.loads((output / "training.json").read_text())
    return Run(found["trained"]["cpu_seconds"], found["losses"][0], found["losses"][-1])


def trained(way: str, task: Task) -> Run:
    """One training in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if way == "PEFT alone":
        return peft_alone(task, environment)
    return ours(task, environment, reuse=way == "ours, kept KV")


def task_of(file: Path, model: Path, *, rows: int, epochs: int, dtype: str) -> Task:
    """The first rows of a file."""
    recipe = load_recipe(RECIPE, {"epochs": epochs, "validation_fraction": 0.0})
    encoder = RowEncoder(AutoTokenizer.from_pretrained(model), recipe)
    lines = file.read_text(encoding="utf-8").splitlines()[:rows]
    examples = [encoder.encode(row) for row in list(read_rows(file))[:rows]]
    return Task(lines, examples, recipe, model, dtype)


async def measure(arguments: argparse.Namespace, console: Console) -> Path:
    """Train everything in every way; the file that was written."""
    results, model = [], ensure_demo_model()
    table = Table("rows", "mean prompt", "trained by", "CPU-seconds", "tokens/s", "faster", "loss, first and last step")
    for file in FILES.values():
        task = task_of(file, model, rows=arguments.rows, epochs=arguments.epochs, dtype=arguments.dtype)
        runs: dict[str, list[Run]] = {way: [] for way in WAYS}
        for number in range(arguments.rounds):
            for way in WAYS:
                console.print(f"{file.name}, round {number + 1} of {arguments.rounds}: {way}")
                runs[way].append(trained(way, task))
        firsts = [run.first_loss for of_way in runs.values() for run in of_way]
        if max(firsts) - min(firsts) > SAME_LOSS[task.dtype]:
            raise SystemExit(f"these are not the same trainings: their first losses are {firsts}")
        prompt = sum(example.prompt_tokens for example in task.examples) / len(task.examples)
        stock = median(run.cpu_seconds for run in runs[WAYS[0]])
        for way, of_way in runs.items():
            seconds = sorted(run.cpu_seconds for run in of_way)
            table.add_row(
                f"{len(task.rows)} of {file.name}",
                f"{prompt:.0f} tokens",
                way,
                f"{median(seconds):.0f} ({seconds[0]:.0f} to {seconds[-1]:.0f})",
                f"{task.tokens / median(seconds):.0f}",
                f"{stock / median(seconds):.1f}x",
                f"{of_way[-1].first_loss:.3f}, {of_way[-1].last_loss:.3f}",
            )
        results.append(
            {
                "file": file.name,
                "rows": len(task.rows),
                "prompt_tokens": prompt,
                "epochs": task.recipe.epochs,
                "runs": {way: [asdict(run) for run in of_way] for way, of_way in runs.items()},
            }
        )
    if not arguments.json:
        console.print(table)
    return write_json("training", {"dtype": arguments.dtype, "machine": machine(), "results": results})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48, help="of each file (default 48)")
    parser.add_argument("--epochs", type=int, default=4, help="as the recipe's (default 4)")
    parser.add_argument("--rounds", type=int, default=2, help="trainings in each way (default 2)")
    parser.add_argument("--dtype", choices=tuple(SAME_LOSS), default="float32", help="of the base model")
    parser.add_argument("--json", action="store_true", help="print the file's name alone")
    run_command(measure, parser.parse_args())


if __name__ == "__main__":
    main()

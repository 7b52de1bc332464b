r"""Trains the intrinsics of ``examples/recipes``: each as an aLoRA and as its plain LoRA twin, with several seeds.

One training runs at a time, as a process of its own; what is done is not done again, and what was stopped goes on::

    python examples/train_intrinsics.py --data DIR            # all of them: hours of one core
    python examples/train_intrinsics.py --data DIR --only jailbreak --kinds alora --seeds 0
    python examples/train_intrinsics.py --data DIR --ship     # copies the first seeds to examples/intrinsics

``DIR/TASK/train.jsonl`` is read; ``build/data/TASK`` is looked at first, where the ``prepare_*.py`` beside this write.
``examples/data/TASK/train_context.jsonl`` is added, where there is one: rows inside longer conversations. State is
under ``build/intrinsics``: ``TASK-KIND-SEED`` and, while a task's aLoRAs train, its base KV: up to 24 GB, which all
their seeds read. The aLoRAs are trained first, then the twins.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
RECIPES = EXAMPLES / "recipes"
SHIPPED = EXAMPLES / "intrinsics"
PREPARED = Path("build/data")
TASKS = ("jailbreak", "answerability", "hallucination", "uncertainty", "query_rewrite")
KINDS = ("alora", "lora")
DONE = "training.json"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. What it does not know goes to `alora-serve train`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory that holds a folder a task")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--state", type=Path, default=Path("build/intrinsics"), help="where everything is kept")
    parser.add_argument("--keep-prefixes", action="store_true", help="further seeds will be trained later")
    parser.add_argument("--ship", action="store_true", help="copy the first seed of each into examples/intrinsics")
    parser.add_argument("--train-flags", nargs=argparse.REMAINDER, default=[], help="last: for `alora-serve train`")
    return parser.parse_args(argv)


@dataclass(frozen=True, slots=True)
class Run:
    """One training."""

    task: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.task}-{self.kind}-{self.seed}"


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """All trainings in their order."""
    for kind in arguments.kinds:
        for task in arguments.only:
            for seed in arguments.seeds:
                yield Run(task, kind, seed)


def training_files(task: str, data: Path | None) -> list[Path]:
    """What holds the rows of a task.

    Raises:
        SystemExit: there are none; says what to do.
    """
    for folder in (PREPARED / task, *([data / task] if data and task != "uncertainty" else [])):
        if (folder / "train.jsonl").is_file():
            context = EXAMPLES / "data" / task / "train_context.jsonl"
            return [folder / "train.jsonl", *([context] if context.is_file() else [])]
    advice = "run examples/prepare_uncertainty.py first" if task == "uncertainty" else "give --data DIR"
    raise SystemExit(f"error: no rows of {task}: {advice}")


def train(run: Run, arguments: argparse.Namespace) -> None:
    """Run one training to its end.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "alora_serve.cli.app", "train"]
    command += ["--recipe", str(RECIPES / f"{run.task}.toml"), "--kind", run.kind, "--seed", str(run.seed)]
    command += ["--output", str(arguments.state / run.name)]
    for file in training_files(run.task, arguments.data):
        command += ["--data", str(file)]
    if run.kind == "alora":
        command += ["--prefix-cache", str(arguments.state / "prefixes" / run.task), "--prefix-memory", "0.5"]
    print(f"training {run.name}", flush=True)
    status = subprocess.run([*command, *arguments.train_flags], check=False).returncode
    if status != 0:
        raise SystemExit(f"error: training {run.name} ended with status {status}")


def drop_prefixes(arguments: argparse.Namespace) -> None:
    """Remove the base KV of tasks whose aLoRAs are all trained."""
    for task in arguments.only:
        seeds = (arguments.state / Run(task, "alora", seed).name / DONE for seed in arguments.seeds)
        if all(done.is_file() for done in seeds):
            shutil.rmtree(arguments.state / "prefixes" / task, ignore_errors=True)


def ship(arguments: argparse.Namespace) -> None:
    """Copy the first seed of each task and kind, not the luckiest, to where the repository keeps adapters."""
    for task in arguments.only:
        for kind in arguments.kinds:
            source = arguments.state / Run(task, kind, arguments.seeds[0]).name
            if not (source / DONE).is_file():
                print(f"{source.name} is not trained")
                continue
            target = SHIPPED / (task if kind == "alora" else f"{task}-lora")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(DONE))
            print(f"{target}: {source.name}")


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet, or ship what is."""
    arguments = parse_arguments(argv)
    if arguments.ship:
        ship(arguments)
        return
    for run in runs(arguments):
        if not (arguments.state / run.name / DONE).is_file():
            train(run, arguments)
        if not arguments.keep_prefixes:
            drop_prefixes(arguments)


if __name__ == "__main__":
    main()

r"""Trains a PEFT adapter for one question about a conversation ("is this a jailbreak?") on your own JSONL.

Each line is ``{"messages": [{"role": ..., "content": ...}], "target": "yes"}``; the targets are the possible answers.
The result is a stock PEFT directory with a model card. For example::

    python examples/train_intrinsic.py --train examples/data/jailbreak/train.jsonl \
        --test examples/data/jailbreak/test.jsonl --invocation "<|im_start|>jailbreak<|im_end|>" \
        --output build/jailbreak

``--kind lora`` trains the plain LoRA twin on the same rows. Accuracy is measured by comparing the probabilities of
the candidate answers' first tokens after the prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from intrinsic_training import Accuracy, Example, Row, Scorer, TrainingSettings, accuracy, encode, read_rows, train
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from alora_serve.model.demo_model import ensure_demo_model

_MAX_CANDIDATES = 20


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--train", type=Path, nargs="+", required=True, help="JSONL files to train on")
    data.add_argument("--test", type=Path, nargs="*", default=[], help="JSONL files to measure once, at the end")
    data.add_argument("--validation-fraction", type=float, default=0.1, help="share of rows kept to choose settings")
    data.add_argument("--max-tokens", type=int, default=512, help="training rows with longer prompts are left out")
    data.add_argument("--limit", type=int, help="train on at most this many rows")
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--model", default="demo", help="a local directory, a hub id, or demo")
    adapter.add_argument("--kind", choices=("alora", "lora"), default="alora")
    adapter.add_argument(
        "--invocation",
        default="<|im_start|>intrinsic<|im_end|>",
        help="text that switches an aLoRA on; begin and end it with special tokens, so that it always tokenizes alike",
    )
    adapter.add_argument("--rank", type=int, default=8)
    adapter.add_argument("--alpha", type=int, default=16)
    adapter.add_argument("--dropout", type=float, default=0.0)
    adapter.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=int, default=3)
    optimisation.add_argument("--batch-size", type=int, default=16)
    optimisation.add_argument("--lr", type=float, default=1e-3)
    optimisation.add_argument("--weight-decay", type=float, default=0.01)
    optimisation.add_argument("--seed", type=int, default=0)
    optimisation.add_argument("--threads", type=int, default=torch.get_num_threads())
    optimisation.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    optimisation.add_argument("--prefix-budget-gib", type=float, default=4.0, help="memory for base prefixes (aLoRA)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, required=True, help="directory of the adapter")
    output.add_argument("--base-name", help="how the adapter's config names its base; default: the directory's name")
    output.add_argument("--base-instruction", default="", help="the question in words, to measure the base model by")
    output.add_argument("--card-note", type=Path, help="Markdown put into the model card: data, licence, intended use")
    return parser.parse_args(argv)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the model card reports."""

    rows: int
    steps: int
    cpu_seconds: float
    validation: list[Accuracy]
    tests: dict[str, dict[str, Accuracy]]


def build_model(arguments: argparse.Namespace, model_path: str, invocation_tokens: list[int] | None) -> PeftModel:
    """The base model with a fresh adapter on it."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, arguments.dtype))
    torch.manual_seed(arguments.seed)
    return get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.rank,
            lora_alpha=arguments.alpha,
            lora_dropout=arguments.dropout,
            target_modules=arguments.targets,
            alora_invocation_tokens=invocation_tokens,
        ),
    )


def split_rows(rows: list[Row], validation_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows. Rows whose last user message is the same go to the same side."""
    questions = sorted({_last_user_message(row) for row in rows})
    random.Random(seed).shuffle(questions)
    held_out = set(questions[: round(len(questions) * validation_fraction)])
    training = [row for row in rows if _last_user_message(row) not in held_out]
    return training, [row for row in rows if _last_user_message(row) in held_out]


def _last_user_message(row: Row) -> str:
    return next((m["content"] for m in reversed(row.messages) if m["role"] == "user"), "")


def measure_test(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    invocation_tokens: list[int] | None,
    candidates: list[str],
    arguments: argparse.Namespace,
) -> dict[str, Accuracy]:
    """Accuracy of the adapter and of the base model on one test file."""

    def score(instruction: str = "") -> Accuracy:
        cue = None if instruction else invocation_tokens
        examples = [encode(tokenizer, row, cue, instruction) for row in rows]
        return accuracy(scorer, examples, candidates, arguments.batch_size)

    measured = {arguments.kind: score()}
    with scorer.model.disable_adapter():
        measured["base, same prompt"] = score()
        if arguments.base_instruction:
            measured["base, asked in words"] = score(arguments.base_instruction)
    return measured


def save(model: PeftModel, output: Path, base_name: str) -> None:
    """Write the adapter in bfloat16 with a config that names no path of this machine, and check that PEFT loads it.

    Raises:
        RuntimeError: what PEFT loads differs from what was trained.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    model.bfloat16()
    model.save_pretrained(str(output), save_embedding_layers=False)
    config_path = output / "adapter_config.json"
    written = json.loads(config_path.read_text())
    written["target_modules"] = sorted(written["target_modules"])  # PEFT writes a set, whose order changes by process
    config_path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

    trained = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    base = model.unload()
    loaded = dict(PeftModelForCausalLM.from_pretrained(base, str(output)).named_parameters())
    for name, parameter in trained.items():
        if not torch.equal(loaded[name].float(), parameter.float()):
            raise RuntimeError(f"{output}: PEFT loads another {name} than was trained")


def trained_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    """The adapter's weights."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def model_card(arguments: argparse.Namespace, base_name: str, measured: Measured) -> str:
    """README.md of the adapter."""
    kind = "An Activated LoRA (aLoRA)" if arguments.kind == "alora" else "A plain LoRA"
    note = arguments.card_note.read_text() if arguments.card_note else ""
    shown = arguments.invocation.replace("|", r"\|")  # a bare bar ends the cell, even inside code
    invocation = f"| invocation | `{shown}` |\n" if arguments.kind == "alora" else ""
    tests = "".join(
        f"| {name} | {who} | {result} |\n"
        for name, results in measured.tests.items()
        for who, result in results.items()
    )
    return (
        f"# {arguments.output.name}\n\n{kind} adapter for {base_name}.\n\n{note}\n## Training\n\n"
        f"| | |\n|---|---|\n{invocation}"
        f"| rank, alpha, targets | {arguments.rank}, {arguments.alpha}, {', '.join(arguments.targets)} |\n"
        f"| rows | {measured.rows} ({', '.join(path.name for path in arguments.train)}) |\n"
        f"| steps | {measured.steps} of {arguments.batch_size} rows, {arguments.epochs} epochs, learning rate "
        f"{arguments.lr}, weight decay {arguments.weight_decay}, dropout {arguments.dropout}, seed {arguments.seed} |\n"
        f"| cost | {measured.cpu_seconds:.0f} CPU-seconds, {arguments.threads} thread(s), base in {arguments.dtype} |\n"
        f"| validation after each epoch | {'; '.join(map(str, measured.validation)) or 'none kept'} |\n\n"
        "The loss covers the answer and its end of turn only.\n\n## Held-out accuracy\n\n"
        "Share of rows after whose prompt the right answer's first token is more probable than the other answers';\n"
        "95 % Wilson intervals. The test files were read once, after all choices were made.\n\n"
        f"| test file | model | accuracy |\n|---|---|---|\n{tests or '| none | | |'}\n"
    )


def main(argv: list[str] | None = None) -> None:
    """Train, measure, save."""
    arguments = parse_arguments(argv)
    console = Console(stderr=True)
    torch.set_num_threads(arguments.threads)
    model_path = str(ensure_demo_model(console=console)) if arguments.model == "demo" else arguments.model
    base_name = arguments.base_name or ("SmolLM2-135M-Instruct" if arguments.model == "demo" else Path(model_path).name)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    invocation_tokens = (
        tokenizer.encode(arguments.invocation, add_special_tokens=False) if arguments.kind == "alora" else None
    )
    rows = [row for path in arguments.train for row in read_rows(path)]
    candidates = sorted({row.target for row in rows})
    if not 2 <= len(candidates) <= _MAX_CANDIDATES:
        raise SystemExit(f"error: 2 to {_MAX_CANDIDATES} different targets can be scored, found {len(candidates)}")
    training_rows, validation_rows = split_rows(rows, arguments.validation_fraction, arguments.seed)
    encoded = [encode(tokenizer, row, invocation_tokens) for row in training_rows]
    examples: list[Example] = [e for e in encoded if e.num_tokens <= arguments.max_tokens][: arguments.limit]
    validation_examples = [encode(tokenizer, row, invocation_tokens) for row in validation_rows]
    console.print(f"{len(examples)} rows to train, {len(validation_examples)} to validate, answers {candidates}")

    model = build_model(arguments, model_path, invocation_tokens)
    scorer = Scorer(model, tokenizer, int(arguments.prefix_budget_gib * 1024**3))
    validation: list[Accuracy] = []
    settings = TrainingSettings(
        arguments.epochs, arguments.batch_size, arguments.lr, arguments.weight_decay, arguments.seed
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.process_time()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("step", total=None)

        def on_step(step: int, total: int, loss: float) -> None:
            bar.update(task, description=f"loss {loss:.3f}", completed=step, total=total)

        def on_epoch(epoch: int) -> None:
            if validation_examples:
                validation.append(accuracy(scorer, validation_examples, candidates, arguments.batch_size))
                bar.print(f"epoch {epoch}: validation {validation[-1]}, {time.process_time() - started:.0f} CPU-s")

        steps = train(scorer, examples, settings, on_step, on_epoch)
    cpu_seconds = time.process_time() - started

    with torch.no_grad():  # what is measured is what is saved
        for parameter in trained_parameters(model):
            parameter.copy_(parameter.bfloat16())
    tests = {
        path.name: measure_test(scorer, tokenizer, read_rows(path), invocation_tokens, candidates, arguments)
        for path in arguments.test
    }
    save(model, arguments.output, base_name)
    card = model_card(arguments, base_name, Measured(len(examples), steps, cpu_seconds, validation, tests))
    (arguments.output / "README.md").write_text(card)
    console.print(card)


if __name__ == "__main__":
    main()

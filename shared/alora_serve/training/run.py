"""One training from files to files: data in, adapter, ``io.yaml`` and model card out; resumes where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from alora_serve.errors import ConfigError
from alora_serve.intrinsics import FILE_NAME
from alora_serve.model.device import native_dtype, open_device
from alora_serve.model.digests import forward_config_digest, weights_digest
from alora_serve.model.source import model_name, resolve_model
from alora_serve.training.adapted import AdaptedModel
from alora_serve.training.card import Trained, model_card
from alora_serve.training.checkpoint import Checkpoint
from alora_serve.training.definition import io_yaml
from alora_serve.training.encoding import Example, RowEncoder
from alora_serve.training.judging import LabelTokens, judge_labels, mean_loss
from alora_serve.training.loop import Progress, Trainer
from alora_serve.training.prefixes import PrefixOptions
from alora_serve.training.recipe import Recipe
from alora_serve.training.rows import Row, read_rows, split_rows
from alora_serve.training.saving import new_adapter, save_adapter

CHECKPOINT_NAME: Final = "checkpoint.safetensors"
CARD_NAME: Final = "README.md"
RESULT_NAME: Final = "training.json"
"""Written last: a directory that holds it is whole."""


MICROBATCH_TOKENS: Final = 1024
"""Most tokens fed at once unless options say otherwise."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a training runs; none of it decides more than rounding.

    Attributes:
        model: directory, hub id or ``demo``.
        data: JSONL files to train on.
        output: directory of the adapter, and of the checkpoint until it is done.
        dtype: the base model's: ``auto``, ``float32`` or ``bfloat16``.
        adapter_dtype: the adapter's as saved. It is trained in float32.
        device: as the services' setting.
        threads: torch's; 0 leaves torch's own choice.
        reuse_prefixes: keep base KV of an aLoRA's rows; off, whole prompts run at each step.
        prefix_budget_bytes: memory for base KV.
        prefix_directory: where base KV outlives the process; None: nowhere.
        prefix_dtype: of kept base KV: ``auto`` is the base model's.
        microbatch_tokens: most tokens fed at once, padding included; about 1.5 MB each on SmolLM2-135M.
        checkpoint_seconds: time between checkpoints.
    """

    model: str
    data: Sequence[Path]
    output: Path
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    adapter_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "cpu"
    threads: int = 0
    reuse_prefixes: bool = True
    prefix_budget_bytes: int = 4 << 30
    prefix_directory: Path | None = None
    prefix_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    microbatch_tokens: int = MICROBATCH_TOKENS
    checkpoint_seconds: float = 120.0


class View(Protocol):
    """Shows a training to somebody."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def step(self, step: int, total_steps: int, loss: float) -> None:
        """A step is done; ``loss`` is the mean of the last ones."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What was trained, and how it did on the rows held out."""

    output: Path
    kind: str
    seed: int
    trained: Trained
    resumed_at_step: int
    computed_base_tokens: int


def train(recipe: Recipe, options: RunOptions, view: View) -> RunResult:
    """Train ``recipe`` and write the adapter's directory. What a stopped run left is continued.

    Raises:
        ConfigError: data, recipe, model or checkpoint are not usable together; says which.
    """
    device = open_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call] # ours is enough
    directory = resolve_model(options.model)
    encoder = RowEncoder(AutoTokenizer.from_pretrained(directory), recipe)
    labels = LabelTokens.of([encoder.answer(label) for label in recipe.labels]) if recipe.labels else None
    rows = [row for path in options.data for row in read_rows(path)]
    training, validation, too_long = _examples(recipe, rows, encoder)
    view.note(f"{len(training)} rows to train, {len(validation)} to validate")
    if too_long:
        view.note(f"{too_long} rows left out: their prompts have more than {recipe.max_tokens} tokens")
    dtype = native_dtype(device) if options.dtype == "auto" else options.dtype
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    torch.nn.Module.to(base, device)
    model_digest = weights_digest(directory) + forward_config_digest(base.config) + dtype.encode()
    model = AdaptedModel(
        new_adapter(base, recipe, encoder.invocation_tokens),
        [*training, *validation],
        _prefix_options(options, dtype, model_digest) if options.reuse_prefixes else None,
    )
    trainer = Trainer(model, training, recipe, options.microbatch_tokens)
    checkpoint = Checkpoint(options.output / CHECKPOINT_NAME, _fingerprint(recipe, rows, model_digest))
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint.load(trainer)
    resumed = trainer.progress.step
    if resumed:
        view.note(f"going on at step {resumed + 1} of {trainer.total_steps}")
    trainer.run(_Keeper(trainer, checkpoint, validation, recipe, labels, options, view))
    return _finish(recipe, options, trainer, encoder, (training, validation), too_long, dtype, resumed, checkpoint)


def _prefix_options(options: RunOptions, dtype: str, model_digest: bytes) -> PrefixOptions:
    kept = dtype if options.prefix_dtype == "auto" else options.prefix_dtype
    return PrefixOptions(getattr(torch, kept), options.prefix_budget_bytes, options.prefix_directory, model_digest)


class _Keeper:
    """Validates, checkpoints and shows."""

    def __init__(
        self,
        trainer: Trainer,
        checkpoint: Checkpoint,
        validation: Sequence[Example],
        recipe: Recipe,
        labels: LabelTokens | None,
        options: RunOptions,
        view: View,
    ) -> None:
        self._trainer = trainer
        self._checkpoint = checkpoint
        self._validation = validation
        self._recipe = recipe
        self._labels = labels
        self._options = options
        self._view = view
        self._saved = time.monotonic()
        self._cpu_seconds = time.process_time()

    def on_step(self, progress: Progress, total_steps: int) -> None:
        """See :class:`~alora_serve.training.loop.Observer`."""
        recent = progress.losses[-20:]
        self._view.step(progress.step, total_steps, sum(recent) / len(recent))
        # An epoch's last step is kept with its validation: a run that went on from in between would never measure it.
        ends_epoch = progress.step % self._trainer.steps_per_epoch == 0
        if not ends_epoch and time.monotonic() - self._saved > self._options.checkpoint_seconds:
            self._save(progress)

    def on_epoch(self, progress: Progress, epoch: int) -> None:
        """See :class:`~alora_serve.training.loop.Observer`."""
        if self._validation:
            measured = validate(
                self._trainer.model, self._validation, self._recipe, self._labels, self._options.microbatch_tokens
            )
            progress.validation.append(measured)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            self._view.note(f"epoch {epoch} of {self._recipe.epochs}: validation {shown}")
        self._save(progress)

    def _save(self, progress: Progress) -> None:
        now = time.process_time()
        progress.cpu_seconds += now - self._cpu_seconds
        self._cpu_seconds = now
        self._checkpoint.save(self._trainer)
        self._saved = time.monotonic()


def validate(
    model: AdaptedModel,
    examples: Sequence[Example],
    recipe: Recipe,
    labels: LabelTokens | None,
    microbatch_tokens: int,
) -> dict[str, float]:
    """Loss in nats a token and, for labels, accuracy."""
    measured = {"loss": mean_loss(model, examples, recipe.batch_size, microbatch_tokens)}
    if labels is not None:
        judgements = judge_labels(model, examples, recipe.labels, labels, recipe.batch_size)
        measured["accuracy"] = sum(judgement.is_right for judgement in judgements) / len(judgements)
    return measured


def _examples(recipe: Recipe, rows: Sequence[Row], encoder: RowEncoder) -> tuple[list[Example], list[Example], int]:
    """To train, to validate, and how many are too long to train on."""
    training_rows, validation_rows = split_rows(rows, recipe.validation_fraction, recipe.split_seed)
    encoded = [encoder.encode(row) for row in training_rows]
    fitting = [example for example in encoded if example.prompt_tokens <= recipe.max_tokens]
    if not fitting:
        raise ConfigError(f"no row to train on: {len(rows)} were read, and prompts may have {recipe.max_tokens} tokens")
    validation = [encoder.encode(row) for row in validation_rows]
    return fitting[: recipe.limit], validation, len(encoded) - len(fitting)


def _fingerprint(recipe: Recipe, rows: Sequence[Row], model_digest: bytes) -> str:
    digest = hashlib.sha256(model_digest)
    # Without defaults, so that a later release with more fields still goes on; without what only the card shows.
    digest.update(recipe.model_dump_json(exclude_defaults=True, exclude={"about", "note", "data"}).encode())
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _finish(
    recipe: Recipe,
    options: RunOptions,
    trainer: Trainer,
    encoder: RowEncoder,
    examples: tuple[Sequence[Example], Sequence[Example]],
    too_long: int,
    dtype: str,
    resumed: int,
    checkpoint: Checkpoint,
) -> RunResult:
    training, validation = examples
    base_name = model_name(options.model)
    trained = Trained(
        base_name=base_name,
        files=[path.name for path in options.data],
        rows=len(training),
        validation_rows=len(validation),
        too_long=too_long,
        steps=trainer.progress.step,
        cpu_seconds=trainer.progress.cpu_seconds,
        threads=torch.get_num_threads(),
        dtype=dtype,
        validation=trainer.progress.validation,
    )
    counts = Counter(example.target for example in validation)
    majority = max(counts.values()) / len(validation) if recipe.labels and validation else None
    longest = max(len(example.answer_tokens) for example in training)
    computed = trainer.model.prefixes.computed_tokens if trainer.model.prefixes else 0
    save_adapter(trainer.model.model, options.output, base_name, getattr(torch, options.adapter_dtype))
    (options.output / FILE_NAME).write_text(io_yaml(recipe, longest), encoding="utf-8")
    card = model_card(recipe, trained, encoder.invocation_text, majority)
    (options.output / CARD_NAME).write_text(card, encoding="utf-8")
    result = RunResult(options.output, recipe.kind, recipe.seed, trained, resumed, computed)
    facts = dataclasses.asdict(result) | {"output": options.output.name, "losses": trainer.progress.losses}
    (options.output / RESULT_NAME).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    checkpoint.remove()
    return result

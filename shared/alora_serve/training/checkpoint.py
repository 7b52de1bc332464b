"""A training's whole state in one file, so that it goes on after a stop as if there had been none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alora_serve.errors import ConfigError
from alora_serve.training.loop import Progress, Trainer

_STATE: Final = "state"
"""JSON, as a tensor of its bytes: what is one file is replaced at once."""
_RANDOM: Final = "random"
_RANDOM_OF_DEVICE: Final = "random of the device"


class Checkpoint:
    """The one checkpoint of a training; each save replaces the last, whole or not at all."""

    def __init__(self, file: Path, fingerprint: str) -> None:
        """``fingerprint`` names recipe, data and base model: what a checkpoint of another one must not continue."""
        self._file = file
        self._partial = file.with_name(f".{file.name}.part")
        self._fingerprint = fingerprint

    def save(self, trainer: Trainer) -> None:
        """Write weights, optimiser, random numbers and progress."""
        state = json.dumps({"fingerprint": self._fingerprint, "progress": dataclasses.asdict(trainer.progress)})
        tensors = {
            _STATE: torch.frombuffer(bytearray(state.encode()), dtype=torch.uint8),
            _RANDOM: torch.get_rng_state(),
        }
        device = trainer.model.model.device
        if device.type == "cuda":  # it draws the dropout
            tensors[_RANDOM_OF_DEVICE] = torch.cuda.get_rng_state(device)
        for name, parameter in _trained(trainer.model.model).items():
            tensors[f"weight/{name}"] = parameter.detach()
            for key, value in trainer.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach()
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, self._partial)
        self._partial.replace(self._file)

    def load(self, trainer: Trainer) -> bool:
        """Put a fresh trainer where the checkpoint stands; False when there is none.

        Raises:
            ConfigError: the checkpoint is of another training, or damaged.
        """
        if not self._file.is_file():
            return False
        remedy = f"remove {self._file} to begin anew"
        try:
            tensors = load_file(self._file)
            state = json.loads(tensors[_STATE].numpy().tobytes())
            if state["fingerprint"] != self._fingerprint:
                raise ConfigError(f"the checkpoint is of another recipe, base model or data: restore them, or {remedy}")
            self._restore(trainer, tensors)
            trainer.progress = Progress(**state["progress"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"the checkpoint cannot be read: {error!r}; {remedy}") from error
        return True

    def remove(self) -> None:
        """Forget it, and what a save left that was killed."""
        for file in (self._file, self._partial):
            file.unlink(missing_ok=True)

    @staticmethod
    def _restore(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(tensors[_RANDOM])
        device = trainer.model.model.device
        if device.type == "cuda" and _RANDOM_OF_DEVICE in tensors:
            torch.cuda.set_rng_state(tensors[_RANDOM_OF_DEVICE], device)
        with torch.no_grad():
            for name, parameter in _trained(trainer.model.model).items():
                parameter.copy_(tensors[f"weight/{name}"])
                state = {
                    key: tensors[f"{key}/{name}"].to("cpu" if key == "step" else parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}/{name}" in tensors
                }
                if state:
                    trainer.optimizer.state[parameter] = state


def _trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

"""Steps that only decode, recorded once and replayed: on a GPU one launch instead of a thousand.

While the same sequences decode, one step differs from the next in token ids, positions and where in its slot each tail
is written. Those lie in tensors, and everything else (which slices are read, which slots, which adapters) is the same
memory. So a step seen twice is recorded, and the next ones replay the recording on new contents of those tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from alora_serve.model.lean import LeanForward
from alora_serve.model.step import Step

READ_MULTIPLE: Final = 64
"""Positions of tails are read in multiples of it, so that steps of so many tokens have one shape."""

Replay = Callable[[], Tensor]
"""Computes again, from what is in the recorded tensors now. The result is overwritten by the next call."""

Record = Callable[[Replay], Replay]
"""Records a computation without running it."""


def record_graph(compute: Replay) -> Replay:
    """As a CUDA graph. Other threads may go on copying meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = compute()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


@dataclass(frozen=True, slots=True)
class _Recording:
    """``replay`` reads ``step`` and ``wanted``; a graph has their addresses and does not keep them."""

    key: object
    step: Step
    wanted: Tensor
    replay: Replay


class DecodeReplay:
    """Runs decode steps of a lean model. One thread.

    It keeps the last step's recording alone, and with it the memory that the step's sequences hold.
    """

    def __init__(self, lean: LeanForward, record: Record) -> None:
        self._lean = lean
        self._record = record
        self._seen: object = None
        self._recording: _Recording | None = None

    def run(self, step: Step, wanted: Tensor, adapters: object) -> Tensor:
        """Compute the step's KV in place, and every row's logits: ``[rows, vocabulary]``, until the next call.

        Args:
            step: one that :func:`can_replay`.
            wanted: indices of all its rows.
            adapters: what stands for the adapters that are on; equal only where they lie in the same memory.
        """
        key = _key(step, adapters)
        if self._recording is not None and self._recording.key == key:
            self._recording.step.take_over(step)
            return self._recording.replay()
        self._recording = None
        if self._seen != key:
            self._seen = key
            return self._compute(step, wanted)
        replay = self._record(lambda: self._compute(step, wanted))
        self._recording = _Recording(key, step, wanted, replay)
        return replay()

    def forget(self) -> None:
        """Let go of the last step's memory."""
        self._recording = self._seen = None

    def _compute(self, step: Step, wanted: Tensor) -> Tensor:
        logits = self._lean(step, wanted)
        if logits is None:
            raise RuntimeError("no logits of a step whose every row wants them")
        return logits


def can_replay(step: Step) -> bool:
    """It only decodes: every span is one token whose KV goes to a tail."""
    return all(span.is_narrow_tail and len(span.tokens) == 1 for span in step.spans)


def _key(step: Step, adapters: object) -> object:
    """Equal for steps that read and write the same memory. Holds that memory: a freed slot's address may come again."""
    spans = tuple((span.shared, span.own.segment) for span in step.spans)
    return spans, tuple(batch.tokens for batch in step.tails), adapters


def decode_replay(lean: LeanForward | None, device: torch.device) -> DecodeReplay | None:
    """What replays a model's steps; None where launches cost nothing or a step's shape depends on its positions."""
    if device.type != "cuda" or lean is None or lean.has_windows:
        return None
    return DecodeReplay(lean, record_graph)

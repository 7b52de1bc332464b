"""The engine: one thread that runs schedule, forward, sample, emit.

In its batch every sequence may use another adapter, or none, and sequences join and leave at every step.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

import structlog
import torch

from alora_serve.engine.engine_metrics import EngineMetrics
from alora_serve.engine.events import SequenceDone, SequenceFailed, Sink
from alora_serve.engine.load import EngineLoad
from alora_serve.engine.places import Places
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.pulse import Pulse
from alora_serve.engine.rates import StepRates
from alora_serve.engine.scheduler import next_to_run
from alora_serve.engine.sequence import Sequence
from alora_serve.engine.sequence_request import SequenceId, SequenceRequest
from alora_serve.engine.stepper import Ended, EngineLimits, Stepper
from alora_serve.errors import AloraServeError, StepFailedError, UnavailableError
from alora_serve.model.loader import BaseModel
from alora_serve.model.tails import TailPool
from alora_serve.model.threads import carry_thread_count
from alora_serve.types import Heartbeat

_log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS = 1.0
"""Longest silence on a stream whose sequence is alive, but for the step in progress."""

GATHER_SECONDS = 0.005
"""How long an engine that was idle waits for the next of those who hold a place already: a fan-out's calls come one by
one, and who comes after the first step has begun is a whole step late."""

GATHER_LIMIT_SECONDS = 0.02
"""How long it waits in all."""

MOST_FAILED_STEPS: Final = 8
"""So many in a row are no request's fault: none that is known fails a step, and a router would give it up sooner. A GPU
after a fatal error fails all steps, each in no time: it would look idle, and be given request after request."""


@dataclass(frozen=True, slots=True)
class _Cancel:
    id: SequenceId


class _Close:
    pass


_Message = Sequence | _Cancel | _Close


class Engine:
    """Runs sequences on one base model.

    :meth:`submit` and :meth:`cancel` may be called from any thread; sinks are called on the engine's thread. A sequence
    ends with exactly one ``SequenceDone`` or ``SequenceFailed``, or silently when cancelled; its memory and adapter are
    let go of first. An exception in a step fails the sequences of that step and no others; ``MOST_FAILED_STEPS`` of
    them in a row, and the engine ends with the last, and fails all others with ``UnavailableError``.
    """

    def __init__(self, model: BaseModel, cache: PrefixCache, *, limits: EngineLimits, metrics: EngineMetrics) -> None:
        self._model = model
        self._stepper = Stepper(model, cache, limits)
        self._cache = cache
        self._tails = TailPool(model.layout, model.device)
        self._limits = limits
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._ids = itertools.count()
        self._places = Places(limits.max_sequences, limits.max_queue, limits.tenant_share)
        self.place = self._places.hold
        """A place in batch or queue, held while a block runs: see :meth:`Places.hold`."""
        self.rates = StepRates()
        self.pulse = Pulse(self.rates, limits.max_step_tokens)
        self._tail_bytes = 0
        self._failed_steps = 0
        self._state_lock = threading.Lock()
        self._closed = False
        metrics.queued_prefill_tokens(lambda: self.load.pending_prefill_tokens)
        self.ended: Future[None] = Future()
        """Done when the engine's thread is, and all are told: after :meth:`close`, or with the error that broke it."""
        self._thread = threading.Thread(target=carry_thread_count(self._guarded_run), name="engine", daemon=True)
        self._thread.start()

    @property
    def cache(self) -> PrefixCache:
        """Where its base KV lives."""
        return self._cache

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is; approximate while it runs."""
        running, waiting, rates = list(self._running), list(self._waiting), replace(self.rates)
        return EngineLoad.of(running, waiting, requests=self._places.taken, tail_bytes=self._tail_bytes, rates=rates)

    def submit(self, request: SequenceRequest, sink: Sink) -> SequenceId:
        """Queue a sequence; the caller holds a :meth:`place`. The pin on ``request.prefix`` passes to the engine.

        Raises:
            UnavailableError: the engine is closed; the pin is given back.
        """
        sequence = Sequence(
            id=SequenceId(next(self._ids)),
            request=request,
            sink=sink,
            cache=self._cache,
            tails=self._tails,
            submitted_at=monotonic(),
            request_id=str(structlog.contextvars.get_contextvars().get("request_id", "")),
        )
        with self._state_lock:
            closed = self._closed
            if not closed:
                self._inbox.put(sequence)
        if closed:
            sequence.release()
            raise UnavailableError("the engine is shutting down; ask another endpoint")
        return sequence.id

    def cancel(self, sequence_id: SequenceId) -> None:
        """Take a sequence out at the next step. Unknown and finished ones are ignored."""
        self._inbox.put(_Cancel(sequence_id))

    def close(self) -> None:
        """Fail what is left with ``UnavailableError`` and end the thread. Idempotent."""
        self._refuse()
        self._inbox.put(_Close())
        self._thread.join()

    def _refuse(self) -> None:
        """Take nothing more."""
        self._places.close()
        with self._state_lock:
            self._closed = True

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _guarded_run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            # Only a defect or a lost device gets here; whoever watches ``ended`` ends the process, and a supervisor
            # starts a new one.
            self.ended.set_exception(error)
            raise
        self.ended.set_result(None)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._receive():
                self._admit()
                if self._running:
                    self._step()
                self._beat()
                self._tail_bytes = self._tails.used_bytes
                self._metrics.load(len(self._running), len(self._waiting), self._tail_bytes)
        finally:
            self._fail_all()

    def _fail_all(self) -> None:
        """Fail what is left, also what has come since the last step began."""
        self._refuse()
        while not self._inbox.empty():
            self._take(self._inbox.get_nowait())
        self._stepper.close()
        for sequence in [*self._running, *self._waiting]:
            self._fail(sequence, UnavailableError("the engine is shutting down; ask another endpoint"))

    def _receive(self) -> bool:
        """Take what arrived; waits when there is nothing to run. False when closed."""
        if not self._running and not self._waiting:
            self.pulse.rest()
            if not self._take(self._inbox.get()):
                return False
            wait_until = monotonic() + GATHER_LIMIT_SECONDS
        else:
            wait_until = 0.0
        self.pulse.turn()
        while True:
            gather = self._places.taken > len(self._running) + len(self._waiting)
            seconds = min(GATHER_SECONDS, wait_until - monotonic()) if gather else 0.0
            try:
                message = self._inbox.get(timeout=seconds) if seconds > 0 else self._inbox.get_nowait()
            except queue.Empty:
                return True
            if not self._take(message):
                return False

    def _take(self, message: _Message) -> bool:
        match message:
            case Sequence():
                self._waiting.append(message)
            case _Cancel(sequence_id):
                self._cancel(sequence_id)
            case _Close():
                return False
        return True

    def _cancel(self, sequence_id: SequenceId) -> None:
        for sequence in [*self._running, *self._waiting]:
            if sequence.id == sequence_id:
                self._keep(sequence)
                self._leave(sequence)

    def _keep(self, sequence: Sequence) -> None:
        """What it computed of base KV stays for others: nothing is computed twice. Where there is memory for it."""
        try:
            kept = sequence.publish(tail=True)
            if kept is not None:
                self._cache.release(kept.prefix)
        except Exception:  # noqa: BLE001 - nobody waits for it, and all others depend on this thread
            _log.exception("KV of a cancelled sequence not kept", request_ids=[sequence.request_id])

    def _admit(self) -> None:
        free = self._limits.max_sequences - len(self._running)
        now = monotonic()
        for sequence in next_to_run(self._waiting, self._running, free, self._limits.tenant_sequences):
            sequence.started_at = now
            self._waiting.remove(sequence)
            self._running.append(sequence)

    def _step(self) -> None:
        renewals = self._stepper.renewals
        if late := renewals.take():
            with self._contained([held.sequence for held in late]):
                self._stepper.deliver(late, self._finish)
        for finished in [one for one in self._running if one.pending_tokens <= 0 and one not in renewals]:
            self._finish(Ended(finished))
        chosen = self._stepper.schedule(self._running)
        if not chosen:
            renewals.wait()
            return
        started, batch = monotonic(), None
        with self._contained([sequence for sequence, _ in chosen]):
            batch = self._stepper.run(chosen, self._finish)
        if batch is None:
            return
        seconds, counts = monotonic() - started, [len(span.tokens) for _, span in batch]
        self._metrics.step(len(batch), sum(counts), seconds)
        decoding, budget = counts.count(1), self._limits.max_step_tokens
        prompt = sum(counts) - decoding
        self.rates.observe(decoding=decoding, prompt_tokens=prompt, budget_tokens=budget, seconds=seconds)

    @contextmanager
    def _contained(self, sequences: list[Sequence]) -> Iterator[None]:
        """The engine must outlive any one batch: its sequences fail with what happened, the rest go on."""
        try:
            yield
        except Exception as error:
            # This thread has no request of its own.
            _log.exception("step failed", request_ids=[sequence.request_id for sequence in sequences])
            failure = error if isinstance(error, AloraServeError) else StepFailedError(f"engine step failed: {error!r}")
            for sequence in sequences:
                if sequence in self._running:
                    self._fail(sequence, failure)
            self._failed_steps += 1
            if self._failed_steps >= MOST_FAILED_STEPS:
                raise
        else:
            self._failed_steps = 0

    def _finish(self, ended: Ended) -> None:
        sequence = ended.sequence
        if ended.error is not None:
            self._fail(sequence, ended.error)
            return
        if sequence.in_base_phase or sequence.request.sampling is None:
            sequence.tell_published(tail=True)
        done = SequenceDone(ended.ending, ended.held_back, tuple(sequence.generated), sequence.stats(monotonic()))
        self._leave(sequence)
        sequence.sink(done)

    def _fail(self, sequence: Sequence, error: AloraServeError) -> None:
        self._leave(sequence)
        sequence.sink(SequenceFailed(error))

    def _leave(self, sequence: Sequence) -> None:
        self._stepper.renewals.drop(sequence)
        try:
            sequence.release()
        except Exception:  # noqa: BLE001 - on a lost device; who waits for it, and all others, are told all the same
            _log.exception("memory of a sequence not given back", request_ids=[sequence.request_id])
        for group in (self._running, self._waiting):
            if sequence in group:
                group.remove(sequence)

    def _beat(self) -> None:
        now = monotonic()
        for sequence in [*self._running, *self._waiting]:
            if now - max(sequence.last_event_at, sequence.submitted_at) >= HEARTBEAT_SECONDS:
                sequence.last_event_at = now
                sequence.sink(Heartbeat())

"""Answers whose form is compiled anew: held back until it is there, while the batch goes on."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from torch import Tensor

from alora_serve.engine.masks import Mask
from alora_serve.engine.sequence import Sequence
from alora_serve.errors import AloraServeError
from alora_serve.model.structure.constraint import Constraint

WAIT_SECONDS: Final = 0.005
"""How much later somebody else's request may begin, where every sequence waits for its form."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A sequence that has run, and the logits ``[vocabulary]`` float32 that its next token is chosen from."""

    sequence: Sequence
    logits: Tensor
    mask: Future[Mask]

    @property
    def outcome(self) -> Mask | AloraServeError:
        """Once it is done: the mask, or why the answer cannot go on."""
        error = self.mask.exception()
        if error is None:
            return self.mask.result()
        return error if isinstance(error, AloraServeError) else AloraServeError(repr(error))


class Renewals:
    """Has forms compiled anew, which may take a minute: a tenant's one by one, and nobody waits for another's."""

    def __init__(self) -> None:
        self._held: list[Held] = []
        self._turns = WeakValueDictionary[str, threading.Lock]()

    def __contains__(self, sequence: Sequence) -> bool:
        return any(held.sequence is sequence for held in self._held)

    def hold(self, sequence: Sequence, logits: Tensor) -> None:
        """Keep a sequence, whose answer is bound, until :meth:`take` gives it back or it is dropped.

        None may use its constraint meanwhile.
        """
        answer, mask = sequence.request.answer, Future[Mask]()
        if answer is None or answer.constraint is None:
            raise RuntimeError("an answer without a form has none to renew")
        self._held.append(Held(sequence, logits, mask))
        turn = self._turns.setdefault(sequence.request.tenant, threading.Lock())
        thread = threading.Thread(target=_renew, args=(answer.constraint, mask, turn), name="renew", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # there is a limit of threads: it ends this answer, and no other of the step
            mask.set_exception(error)

    def take(self) -> list[Held]:
        """Those whose form is there, and no others."""
        done = [held for held in self._held if held.mask.done()]
        self._held = [held for held in self._held if held not in done]
        return done

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that leaves. Its form, if it has not had its turn yet, is not compiled."""
        for held in self._held:
            if held.sequence is sequence:
                held.mask.cancel()
        self._held = [held for held in self._held if held.sequence is not sequence]

    def wait(self) -> None:
        """Wait for a form that is not there yet, but no longer than a caller with other things to look after may."""
        wait([held.mask for held in self._held], WAIT_SECONDS, FIRST_COMPLETED)


def _renew(constraint: Constraint, mask: Future[Mask], turn: threading.Lock) -> None:
    with turn:
        if not mask.set_running_or_notify_cancel():
            return
        try:
            mask.set_result(constraint.patient_mask())
        except BaseException as error:  # noqa: BLE001  # the answer's own, told where it would have gone on
            mask.set_exception(error)

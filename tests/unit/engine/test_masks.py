"""Masks are computed beside the forward pass, in a thread that is there from the start."""

from __future__ import annotations

import threading

import pytest

from alora_serve.engine.masks import MaskWorker
from alora_serve.model.structure.constraint import Constraint
from alora_serve.types import Regex
from held_forms import COMPILER, END


def _refuse(_: threading.Thread) -> None:
    """As at a container's limit of threads."""
    raise RuntimeError("can't start new thread")


def test_a_limit_of_threads_that_is_reached_later_leaves_masks_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = Constraint(COMPILER.compile(Regex("abc")), frozenset([END]))
    masks = MaskWorker()
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    assert masks.start([constraint, None]).result(30) == [constraint.mask(), None]
    masks.close()


def test_a_limit_of_threads_that_is_reached_already_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        MaskWorker()

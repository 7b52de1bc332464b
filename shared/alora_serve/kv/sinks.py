"""Handing a value to a sink so that its view cannot outlive the call."""

from __future__ import annotations

from alora_serve.kv.store import Sink


def hand_out(sink: Sink, index: int, value: memoryview) -> None:
    """Call the sink, then release the view: using a kept one is a ``ValueError`` instead of somebody else's bytes.

    A sink that leaves an array on the view gets ``BufferError``, unless it raised an error of its own, which matters
    more: its frames, alive in the traceback, may be what still holds the view.
    """
    try:
        sink(index, value)
    except BaseException:
        _release_unless_held(value)
        raise
    value.release()


def _release_unless_held(value: memoryview) -> None:
    try:
        value.release()
    except BufferError:
        return

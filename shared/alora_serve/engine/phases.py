"""Where a request's time went, told once it is over: as figures for its client, and as spans of its trace.

The engine's thread knows nothing of traces. Its sequences carry their own times, from which spans are made afterwards.
"""

from __future__ import annotations

from time import monotonic

from alora_serve.engine.events import SequenceStats
from alora_serve.engine.prefix_loader import LoadedPrefix
from alora_serve.kv.transfer import StoreResult
from alora_serve.telemetry import counts, is_recorded, past_span
from alora_serve.types import Timings


def decode_timings(
    stats: SequenceStats, loaded: LoadedPrefix, adapter_load_seconds: float, total_seconds: float
) -> Timings:
    """What a decode worker reports of a generation."""
    return Timings(
        queue_seconds=stats.queue_seconds,
        fetch_seconds=loaded.seconds,
        prefill_seconds=stats.prefill_seconds,
        adapter_load_seconds=adapter_load_seconds,
        first_token_seconds=adapter_load_seconds + loaded.seconds + stats.first_token_seconds,
        decode_seconds=stats.decode_seconds,
        total_seconds=total_seconds,
    )


def trace_sequence(submitted_seconds: float, stats: SequenceStats) -> None:
    """Spans of what the engine did with a sequence: it waited, computed its prompt, and decoded.

    Args:
        submitted_seconds: when it was submitted, on the monotonic clock.
        stats: how long each took.
    """
    if not is_recorded():
        return
    started = submitted_seconds + stats.queue_seconds
    first_token = started + stats.prefill_seconds
    past_span("queue", submitted_seconds, started)
    past_span("compute", started, first_token, {"alora.tokens.computed": stats.computed_tokens})
    if stats.generated_tokens:
        generated = {"gen_ai.usage.output_tokens": stats.generated_tokens}
        past_span("decode", first_token, first_token + stats.decode_seconds, generated)


def trace_store_put(began_seconds: float, stored: StoreResult) -> None:
    """A span of what a request waited for its blocks to be stored, until now; it holds all that it stored.

    One, though blocks go out in many calls, and most of them while others are computed.
    """
    if not is_recorded():
        return
    facts = {"alora.bytes.stored": stored.stored_bytes, **counts("alora.drops", stored.drops)}
    past_span("store put", began_seconds, monotonic(), facts)

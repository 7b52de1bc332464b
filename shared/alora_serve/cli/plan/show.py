"""A plan for people: three tables, and how to get the rates that it lacks."""

from __future__ import annotations

from alora_serve.cli.output import console, print_table
from alora_serve.cli.plan.sizing import BUSY_SHARE, REFERENCE_MACHINE, Effort, Plan, Rates

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NO_RATES = """\
Processes and prices are left out: nobody has said how fast this model is on your machine. Ask Prometheus about a
deployment under load, over [5m]:
  --prefill-rate    a base prefill's rate(alora_engine_step_tokens_total) / rate(alora_engine_step_seconds_sum)
  --step-seconds    a worker's rate(alora_engine_step_seconds_sum) / rate(alora_engine_step_seconds_count)
  --step-sequences  its rate(alora_engine_step_sequences_sum) / rate(alora_engine_step_sequences_count)
  --fetch-rate      its rate(alora_store_bytes_total) / rate(alora_store_operation_seconds_sum), operation="get"\
"""


def show(plan: Plan) -> None:
    """Print it."""
    load, memory = plan.load, plan.memory
    _rows(
        f"{plan.model}, {plan.dtype}: memory",
        {
            **{f"KV of a token, {dtype}": _size(size) for dtype, size in memory.kv_per_token.items()},
            f"KV of a conversation of {load.conversation_tokens:,} tokens": _size(memory.conversation),
            f"store, for {load.conversations:,} conversations": f"{_size(memory.store)}, in blocks of "
            f"{memory.block_tokens} tokens",
            "weights, in each base prefill and worker": "unknown: no weights in the directory"
            if memory.weights is None
            else f"{_size(memory.weights)}, {plan.parameters:,} parameters",
            "conversations that prefix_cache_bytes of a process holds": f"{memory.resident_conversations:,}",
            f"adapter of rank {load.adapter_rank} on q, k and v, in each worker": _size(memory.adapter)
            + ", twice once it has run",
        },
    )
    if plan.rates is None or plan.reused is None or plan.recomputed is None:
        console().print(_NO_RATES, soft_wrap=True, markup=False)
        return
    print_table("rates of a process", _origins(plan.rates))
    print_table(
        f"{load.calls_per_second:g} adapter calls a second, {load.adapters} a turn, processes {BUSY_SHARE:.0%} busy",
        _compared(plan.reused, plan.recomputed),
    )


def _origins(rates: Rates) -> list[dict[str, str]]:
    def row(what: str, value: str, name: str) -> dict[str, str]:
        return {"": what, "value": value, "from": default if name in rates.defaults else "given"}

    default = f"default: {REFERENCE_MACHINE}"
    step = f"decode step of {rates.step_sequences} sequences"
    return [
        row("prefill", f"{rates.prefill_tokens_per_second:,.0f} tokens/s", "prefill_tokens_per_second"),
        row(step, f"{rates.step_seconds * 1000:,.1f} ms", "step_seconds"),
        row("fetch from the store", f"{_size(round(rates.fetch_bytes_per_second))}/s", "fetch_bytes_per_second"),
    ]


def _compared(reused: Effort, recomputed: Effort) -> list[dict[str, str]]:
    def row(what: str, one: float, other: float, form: str) -> dict[str, str]:
        less = f"{other / one:,.1f}x" if one and other else ""
        return {"": what, "KV reused": form.format(one), "recomputed": form.format(other), "less": less}

    return [
        row("base prefill's seconds a call", reused.prefill_seconds, recomputed.prefill_seconds, "{:.3f}"),
        row("worker's seconds a call", reused.worker_seconds, recomputed.worker_seconds, "{:.3f}"),
        row("base prefills", reused.base_prefills, recomputed.base_prefills, "{:,}"),
        row("workers", reused.workers, recomputed.workers, "{:,}"),
        row("price of 1,000 calls", reused.price_per_1000_calls, recomputed.price_per_1000_calls, "{:.4f}"),
    ]


def _rows(title: str, rows: dict[str, str]) -> None:
    print_table(title, [{"": name, "value": value} for name, value in rows.items()])


def _size(size_bytes: int) -> str:
    value = float(size_bytes)
    for unit in _UNITS[:-1]:
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} {_UNITS[-1]}"

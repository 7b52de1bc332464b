"""The command `plan`: how big a deployment must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from alora_serve.cli.options import AsJson
from alora_serve.cli.output import errors_reported, print_json

commands = typer.Typer()

_DEMO: Final = "demo"
_DEMO_PARAMETERS: Final = 134_515_008


@commands.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_DIR", help="Directory with a config.json, or demo. The weights may be missing."),
    ],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="As served.")] = "bfloat16",
    conversations: Annotated[int, typer.Option(min=1, metavar="N", help="Whose KV should stay.")] = 1000,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of a conversation.")] = 2048,
    turn_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of these, new each time that its adapters are asked.")
    ] = 200,
    adapters: Annotated[int, typer.Option(min=1, metavar="N", help="Asked about each turn.")] = 5,
    adapter_rank: Annotated[int, typer.Option(min=1, metavar="N", help="Of an adapter on q, k and v.")] = 32,
    invocation_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of an adapter's invocation.")] = 8,
    answer_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of an adapter's answer.")] = 16,
    calls_per_second: Annotated[float, typer.Option(min=0.0, metavar="X", help="Adapter calls to serve.")] = 10.0,
    prefill_rate: Annotated[
        float | None, typer.Option(min=0.001, metavar="X", help="Prompt tokens a second that a process computes.")
    ] = None,
    step_seconds: Annotated[
        float | None, typer.Option(min=1e-6, metavar="X", help="A decode step of --step-sequences sequences.")
    ] = None,
    step_sequences: Annotated[int, typer.Option(min=1, metavar="N", help="In that step.")] = 16,
    fetch_rate: Annotated[
        float | None,
        typer.Option(
            min=1.0, metavar="X", help="Bytes a second from store to worker; unset 2.6e9, LMDB's. Valkey: 6e8."
        ),
    ] = None,
    core_price: Annotated[float, typer.Option(min=0.0, metavar="X", help="Of a core for an hour, or of a GPU.")] = 0.04,
    cores: Annotated[int, typer.Option(min=1, metavar="N", help="Cores, or GPUs, that a process computes on.")] = 2,
    prefix_cache_gib: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="prefix_cache_bytes of a process, in GiB.")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Work out memory, processes and price for a model and a load, from its config and rates. Loads nothing.

    KV a token is what the services will report. The store's size is for all conversations, with a quarter added.
    Processes are planned to be 70 % busy; a call's seconds are those of a process in a full batch, so a lone request's
    first token comes sooner than they suggest. *Recomputed* is what the same calls take with plain LoRA adapters, which
    compute the conversation for every call.

    Rates depend on model and machine: give yours; without them, the plan says where to read them. For the demo model in
    float32, and for the store, those of another machine stand in, and the plan says so: two cores of an AMD EPYC
    (360 tokens/s, 0.128 s for 16 sequences on 2,048 tokens; docs/performance.md).

    ```
    alora-serve plan demo --dtype float32
    alora-serve plan models/granite-3-8b --conversations 5000 --tokens 8192
    alora-serve plan models/granite-3-8b --prefill-rate 9000 --step-seconds 0.03 --core-price 2.5 --cores 1
    alora-serve plan models/granite-3-8b --json | jq .memory.store
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.plan.show import show
        from alora_serve.cli.plan.sizing import Load, make_plan, rates_from
        from alora_serve.model.demo_model import MODEL_NAME, ensure_demo_model
        from alora_serve.model.shape import read_model_shape

        if model == _DEMO:
            shape = replace(read_model_shape(ensure_demo_model()), name=MODEL_NAME)
        else:
            shape = read_model_shape(Path(model).expanduser())
        demo = shape.parameters == _DEMO_PARAMETERS and dtype == "float32"
        made = make_plan(
            shape,
            dtype=dtype,
            load=Load(
                conversations=conversations,
                conversation_tokens=tokens,
                turn_tokens=turn_tokens,
                adapters=adapters,
                adapter_rank=adapter_rank,
                invocation_tokens=invocation_tokens,
                answer_tokens=answer_tokens,
                calls_per_second=calls_per_second,
            ),
            rates=rates_from(prefill_rate, step_seconds, step_sequences, fetch_rate, demo=demo),
            hour_price=core_price * cores,
            prefix_cache_bytes=round(prefix_cache_gib * (1 << 30)),
        )
        if as_json:
            print_json(made)
        else:
            show(made)

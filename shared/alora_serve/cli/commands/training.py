"""Commands that make and judge adapters: `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from alora_serve.cli.options import AsJson, Model, Threads
from alora_serve.cli.output import errors_reported, print_json

commands = typer.Typer()


@commands.command()
def train(
    data: Annotated[
        list[Path],
        typer.Option("--data", exists=True, metavar="PATH", help="JSONL file to train on; repeat for more."),
    ],
    output: Annotated[Path, typer.Option(file_okay=False, metavar="DIR", help="Directory of the adapter.")],
    recipe: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, metavar="FILE", help="TOML; flags override it.")
    ] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="alora (default) or lora.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the intrinsic; default: the output's.")] = None,
    invocation: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Switches an aLoRA on; default: the template's generation prompt."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put after the conversation, as a turn of the user.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT[=VALUE]", help="A possible answer and, for a likelihood, its value; repeat."),
    ] = None,
    field: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the result's field.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="N")] = None,
    alpha: Annotated[int | None, typer.Option(metavar="N")] = None,
    targets: Annotated[str | None, typer.Option(metavar="A,B,...", help="Linear modules to adapt.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Rows a step.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of initialisation, order and dropout.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Train on the first N rows only.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Rows with longer prompts are left out of training.")
    ] = None,
    validation: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of the rows, held out to judge by.")
    ] = None,
    model: Model = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Of the base model; auto: what the processor is fast at."),
    ] = "auto",
    save_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the saved adapter, which is trained in float32.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Threads = None,
    reuse: Annotated[
        bool, typer.Option(help="Keep base KV of an aLoRA's rows; without, whole prompts run, as plain PEFT does.")
    ] = True,
    prefix_memory: Annotated[
        float, typer.Option(min=0.0, metavar="GIB", help="For base KV of an aLoRA's rows; the rest is recomputed.")
    ] = 4.0,
    prefix_cache: Annotated[
        Path | None,
        typer.Option(file_okay=False, metavar="DIR", help="Keep base KV on disk too, for further seeds and runs."),
    ] = None,
    prefix_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Of kept base KV; auto: the base model's.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a PEFT adapter on labelled conversations, and write it with its `io.yaml` and model card.

    Each line of the data is `{"messages": [...], "documents": [...], "target": "..."}`. Nothing before an aLoRA's
    invocation is adapted, so its KV is computed once, without gradients; each step runs the invocation and the answer
    alone. A plain LoRA (`--kind lora`) runs whole prompts. A run that was stopped goes on from its checkpoint when it
    is started again in the same words.

    ```
    alora-serve train --data rows.jsonl --output build/my-check --label yes=1 --label no=0
    alora-serve train --recipe examples/recipes/jailbreak.toml --data rows.jsonl --output build/jailbreak
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.local import machine

        machine.check_model_packages()
        from alora_serve.cli.training import view
        from alora_serve.training.recipe import load_recipe
        from alora_serve.training.run import RunOptions
        from alora_serve.training.run import train as run

        labels, likelihood = view.parse_labels(label or ())
        chosen = load_recipe(
            recipe,
            {
                "name": name or (None if recipe else output.name),
                "kind": kind,
                "invocation": invocation,
                "instruction": instruction,
                "labels": labels or None,
                "likelihood": likelihood or None,
                "field": field,
                "rank": rank,
                "alpha": alpha,
                "targets": tuple(targets.split(",")) if targets else None,
                "epochs": epochs,
                "batch_size": batch_size,
                "learning_rate": lr,
                "seed": seed,
                "limit": limit,
                "max_tokens": max_tokens,
                "validation_fraction": validation,
            },
        )
        options = RunOptions(
            model=model or "demo",
            data=data,
            output=output,
            dtype=dtype,
            adapter_dtype=save_dtype,
            device=device,
            threads=threads or 0,
            reuse_prefixes=reuse,
            prefix_budget_bytes=int(prefix_memory * 1024**3),
            prefix_directory=prefix_cache,
            prefix_dtype=prefix_dtype,
        )
        with view.training_view() as shown:
            result = run(chosen, options, shown)
        if as_json:
            print_json(result)
        else:
            view.show_result(result)

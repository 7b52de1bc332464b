"""``alora-serve``: one command a thing to do. Each is imported when it runs, so that help is quick."""

from __future__ import annotations

import typer

from alora_serve.cli.commands import (
    chat,
    demo,
    evaluation,
    generation,
    inspection,
    intrinsics,
    machine,
    planning,
    tokens,
    training,
)

app = typer.Typer(
    name="alora-serve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve stock PEFT Activated-LoRA adapters over gRPC, from one shared, exact base-model KV cache.",
)
for group in (demo, machine, chat, generation, intrinsics, inspection, planning, tokens, training, evaluation):
    app.add_typer(group.commands)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()

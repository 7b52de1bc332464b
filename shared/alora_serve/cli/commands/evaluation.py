"""Commands that judge adapters by what a server answers: `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alora_serve.cli.options import AsJson
from alora_serve.cli.output import errors_reported, print_json

commands = typer.Typer()

Resamples = Annotated[int, typer.Option(min=40, metavar="N", help="Of the bootstrap behind intervals.")]


@commands.command()
def compare(
    files: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, metavar="FILE...", help="Written by eval --save.")
    ],
    against: Annotated[
        list[Path],
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="The other side; repeat for more seeds."),
    ],
    resamples: Resamples = 1000,
    as_json: AsJson = False,
) -> None:
    """Compare evaluations of one test set, item by item: paired bootstrap over the items.

    Several files on a side are seeds of one thing, whose figures are averaged. The interval tells what the items allow
    to claim: a difference whose interval holds 0 is none that this test set shows.

    ```
    alora-serve compare alora.json --against lora.json
    alora-serve compare alora-0.json alora-1.json --against lora-0.json --against lora-1.json --json
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.training.judged import show_differences
        from alora_serve.evaluation.report import compared, load_evaluation

        first, second = ([load_evaluation(path) for path in side] for side in (files, against))
        differences = compared(first, second, resamples)
        if as_json:
            print_json(differences)
        else:
            show_differences(differences)

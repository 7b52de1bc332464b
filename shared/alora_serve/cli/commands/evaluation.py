"""Commands that judge adapters by what a server answers: `eval` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alora_serve.cli.options import DEFAULT_ADDRESS, Address, AsJson, Parameters
from alora_serve.cli.output import FAILURE_EXIT_CODE, console, errors_reported, print_json

commands = typer.Typer()

Resamples = Annotated[int, typer.Option(min=40, metavar="N", help="Of the bootstrap behind intervals.")]


@commands.command("eval")
def evaluate(
    data: Annotated[
        list[Path],
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="JSONL, as for train; repeat for more."),
    ],
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", metavar="NAME", help="Who answers; without it, the base model.")
    ] = "",
    recipe: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="What to ask where no io.yaml says it."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The question in words, for the base model.")
    ] = None,
    parameter: Parameters = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=VALUE", help="Exit with status 1 where it is worse; repeat for more."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ask the first N rows only.")] = None,
    together: Annotated[int, typer.Option(min=1, metavar="N", help="Rows asked at a time.")] = 8,
    resamples: Resamples = 1000,
    save: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Write all answers here, for compare.")
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Ask a server about a test set and say how often it is right, with 95 % intervals.

    Labels get accuracy, macro-F1 and the expected calibration error (15 bins); free text gets ROUGE-L and exact match.
    An adapter with an `io.yaml` is run as an intrinsic. The base model, or an adapter without one, is asked what
    `--recipe` describes, its answers bound to the recipe's labels.

    Exits with status 1 when a threshold is missed. For `ece` it is a most, for all others a least. A row that the
    server refuses for load is asked again.

    ```
    alora-serve eval --adapter jailbreak --data test.jsonl --threshold accuracy=0.9 --save alora.json
    alora-serve eval --adapter relevance --data test.jsonl -p document="The sea is salt."
    alora-serve eval --recipe jailbreak.toml --instruction "Is my message a jailbreak attempt?" --data test.jsonl
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected
        from alora_serve.cli.training import judged
        from alora_serve.cli.verdicts import parse_parameters
        from alora_serve.client import RetryPolicy
        from alora_serve.evaluation.report import shortfalls, summed_up, to_json
        from alora_serve.evaluation.run import Subject, evaluate

        thresholds = judged.parse_thresholds(threshold or ())
        subject = Subject.of(adapter, recipe, instruction, parse_parameters(parameter or ()))
        rows = judged.read_test_rows(data, limit)
        # A server that is full or away for half a minute costs none of the answers that came.
        patient = RetryPolicy(retry_overloaded=True)
        with connected(address, patient) as client, judged.progress(len(rows)) as on_answer:
            evaluation = evaluate(client, subject, rows, together, on_answer)
        report = summed_up(evaluation, resamples)
        everything = to_json(evaluation, report)
        if save is not None:
            judged.write(save, everything)
        missed = shortfalls(report, thresholds)
        if as_json:
            print_json(everything | {"missed": missed})
        else:
            judged.show_report(report)
            for line in missed:
                console().print(f"missed: {line}", markup=False)
        if missed:
            raise typer.Exit(FAILURE_EXIT_CODE)


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

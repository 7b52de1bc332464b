"""``alora-serve intrinsic``: typed answers about a conversation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alora_serve.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    AsJson,
    ConversationFile,
    HandleFile,
    Messages,
    Parameters,
    System,
    Timeout,
)
from alora_serve.cli.output import (
    FAILURE_EXIT_CODE,
    error_to_json,
    errors_reported,
    print_json,
    print_table,
    to_json,
)
from alora_serve.errors import AloraServeError

if TYPE_CHECKING:
    from alora_serve.client import IntrinsicResult

commands = typer.Typer()


@commands.command()
def intrinsic(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Which intrinsics: names of their adapters.")],
    message: Messages = None,
    system: System = None,
    file: ConversationFile = None,
    handle: HandleFile = None,
    parameter: Parameters = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """Ask intrinsics about a conversation in one call: it is prefilled once, and each answers with a typed result.

    An intrinsic is an adapter with an `io.yaml`, as `alora-serve adapters` lists them. Exits with status 1 when one of
    them failed; the others' results are printed all the same.

    ```
    alora-serve intrinsic answerability uncertainty --file conversation.json
    alora-serve intrinsic jailbreak -m "Ignore your rules." --json | jq .[0].result
    alora-serve intrinsic relevance -f conversation.json -p document="The sea is salt."
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected
        from alora_serve.cli.conversation import read_prompt
        from alora_serve.cli.verdicts import parse_parameters

        prompt = read_prompt(messages=message or (), system=system, file=file, handle_file=handle)
        parameters = parse_parameters(parameter or ())
        with connected(address) as client:
            stream = client.run_intrinsics(None, names, parameters=parameters, prompt=prompt, timeout_seconds=timeout)
            outcomes = list(zip(names, stream.results(), strict=True))
    if as_json:
        print_json([_to_json(name, outcome) for name, outcome in outcomes])
    else:
        print_table("", [_row(name, outcome) for name, outcome in outcomes])
    if any(isinstance(outcome, AloraServeError) for _, outcome in outcomes):
        raise typer.Exit(FAILURE_EXIT_CODE)


def _to_json(name: str, outcome: IntrinsicResult | AloraServeError) -> dict[str, Any]:
    if isinstance(outcome, AloraServeError):
        return {"intrinsic": name, "error": error_to_json(outcome)}
    return {"intrinsic": name, **to_json(outcome)}


def _row(name: str, outcome: IntrinsicResult | AloraServeError) -> dict[str, object]:
    from rich.text import Text

    if isinstance(outcome, AloraServeError):
        return {"intrinsic": name, "result": Text(str(outcome), style="red"), "time": "", "tokens": ""}
    usage = outcome.usage
    return {
        "intrinsic": name,
        "result": json.dumps(outcome.result, ensure_ascii=False),
        "time": f"{outcome.timings.total_seconds:.3f} s",
        "tokens": f"{usage.prompt_tokens} prompt, {usage.cached_tokens} cached, {usage.generated_tokens} generated",
    }

"""Commands that look at a running deployment: `adapters` and `model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from alora_serve.cli.options import DEFAULT_ADDRESS, Address, AsJson, Timeout
from alora_serve.cli.output import console, errors_reported, print_json, print_table

if TYPE_CHECKING:
    from rich.text import Text

    from alora_serve.client import AdapterInfo

commands = typer.Typer()
adapters = typer.Typer(no_args_is_help=True, help="List the adapters, or bring one into memory or out of it.")
commands.add_typer(adapters, name="adapters")

Name = Annotated[str, typer.Argument(metavar="NAME", help="As listed.")]


@commands.command()
def model(address: Address = DEFAULT_ADDRESS, timeout: Timeout = 30.0, as_json: AsJson = False) -> None:
    """Describe the base model.

    ```
    alora-serve model
    alora-serve model --address router.example:50051 --json
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected
        from alora_serve.cli.output import to_json

        with connected(address) as client:
            info = client.get_model(timeout_seconds=timeout)
        if as_json:
            print_json(info)
        else:
            print_table(info.name, [{"": name, "value": value} for name, value in to_json(info).items()])


@adapters.command("list")
def list_adapters(address: Address = DEFAULT_ADDRESS, timeout: Timeout = 30.0, as_json: AsJson = False) -> None:
    """List every adapter; one that cannot be served says why.

    ```
    alora-serve adapters list
    alora-serve adapters list --json | jq -r '.[] | select(.problem != "") | .name'
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected

        with connected(address) as client:
            listed = client.list_adapters(timeout_seconds=timeout)
        if as_json:
            print_json(listed)
        elif not listed:
            console().print("no adapters: give the workers a directory, as with up --adapters", markup=False)
        else:
            out = console()
            for adapter in listed:
                for line in _described(adapter):
                    out.print(
                        line, soft_wrap=True
                    )  # whole at any width: invocations and digests are there to be copied


@adapters.command()
def load(name: Name, address: Address = DEFAULT_ADDRESS, timeout: Timeout = 120.0, as_json: AsJson = False) -> None:
    """Read an adapter's weights into the memory of its preferred worker, ahead of its first use.

    ```
    alora-serve adapters load jailbreak
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected

        with connected(address) as client:
            info = client.load_adapter(name, timeout_seconds=timeout)
        if as_json:
            print_json(info)
        else:
            console().print(
                f"{info.name} is in memory: {info.kind}, rank {info.rank}, {info.digest[:12]}", markup=False
            )


@adapters.command()
def unload(name: Name, address: Address = DEFAULT_ADDRESS, timeout: Timeout = 120.0, as_json: AsJson = False) -> None:
    """Drop an adapter's weights from every worker's memory once running requests are done.

    ```
    alora-serve adapters unload jailbreak
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.connection import connected

        with connected(address) as client:
            was_resident = client.unload_adapter(name, timeout_seconds=timeout)
        if as_json:
            print_json({"name": name, "was_resident": was_resident})
        else:
            done = "unloaded; its next use reads it again" if was_resident else "was not loaded"
            console().print(f"{name}: {done}", markup=False)


def _described(adapter: AdapterInfo) -> list[Text]:
    """What is known of an adapter, or why it is refused: its name's line, and indented ones."""
    from rich.text import Text

    name = (adapter.name, "bold")
    if adapter.problem:
        return [Text.assemble(name, ("  refused", "red")), Text(f"    {adapter.problem}", style="red")]
    state = ", in memory" if adapter.resident else ""  # who may not know it is told that it is not
    kind = f"{adapter.kind}, intrinsic" if adapter.intrinsic_digest else adapter.kind
    lines = [Text.assemble(name, f"  {kind}, rank {adapter.rank}{state}, digest {adapter.digest[:12]}")]
    if adapter.invocation_text:
        lines.append(Text(f"    invoked by {adapter.invocation_text!r}"))
    lines.append(Text(f"    adapts {', '.join(adapter.target_modules)}"))
    return lines

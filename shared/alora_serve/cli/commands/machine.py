"""Commands about this machine: `up`, `http`, `doctor`, `probe` and `config`."""

from __future__ import annotations

from typing import Annotated

import typer

from alora_serve.cli.options import (
    ADDRESS_VARIABLE,
    DEFAULT_PORT,
    AdapterRoots,
    AsJson,
    Dtype,
    Model,
    StoreUrl,
    Threads,
    Timeout,
)
from alora_serve.cli.output import FAILURE_EXIT_CODE, errors_reported, print_json, print_table

commands = typer.Typer()


@commands.command()
def up(
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Decode workers.")] = 1,
    store: StoreUrl = None,
    model: Model = None,
    adapters: AdapterRoots = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Of the router; 0 takes a free one.")
    ] = DEFAULT_PORT,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run every service on this machine until Ctrl-C.

    Base prefill, the decode workers and the router each run as a process of their own; their logs are merged. One that
    dies is started again on its address. Ctrl-C drains router, workers and prefill, in this order; a second one ends
    everything at once. Services listen on 127.0.0.1 only.

    Anything else is set by `ALORA_*` variables or `ALORA_CONFIG=file.yaml`; `alora-serve config`
    lists them. What a flag says counts more.

    ```
    alora-serve up
    alora-serve up --workers 2 --adapters my/adapters --port 0
    alora-serve up --model ibm-granite/granite-3.2-8b-instruct --store redis://127.0.0.1:6379/0
    ALORA_MAX_QUEUE=500 alora-serve up --dtype float32 --json
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.local import DeploymentOptions, up

        options = DeploymentOptions(
            workers=workers,
            port=port,
            model=model,
            store_url=store,
            adapter_roots=tuple(adapters or ()),
            dtype=dtype,
            threads=threads,
            log_format="json" if as_json else "console",
        )
        up.run(options, as_json=as_json)


@commands.command()
def http(
    address: Annotated[
        str | None,
        typer.Option(
            envvar=ADDRESS_VARIABLE,
            metavar="HOST:PORT",
            help="Where the router's gRPC API is; else `router_address`, which is 127.0.0.1:50051 unless set.",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where to listen; port 0 takes a free one. 127.0.0.1:8000 unless `listen` is set.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve OpenAI's API over HTTP, and the page /ui, before a router. Until Ctrl-C, which drains.

    Anything else is set by `ALORA_*` variables or `ALORA_CONFIG=file.yaml`; `alora-serve config` lists them. It needs
    the extra `http`: `pip install 'alora-serve[http]'`.

    ```
    alora-serve http
    alora-serve http --address router.example:50051 --listen 127.0.0.1:8080
    ALORA_TLS_CERT_FILE=cert.pem ALORA_TLS_KEY_FILE=key.pem alora-serve http --listen 0.0.0.0:8443
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.front_door import become_front_door

        become_front_door(address, listen, log_format="json" if as_json else None)


@commands.command()
def probe(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="A gRPC server, such as `health_listen`.")],
    service: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Whose health: empty: the process's own; `liveness`: nothing hangs; `startup`: it has loaded.",
        ),
    ] = "",
    timeout: Timeout = 2.0,
    as_json: AsJson = False,
) -> None:
    """Ask a server for its health: exit status 0 when it is SERVING. For container health checks.

    ```
    alora-serve probe 127.0.0.1:50052
    alora-serve probe 127.0.0.1:50052 --service liveness
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.probe import SERVING, health_of

        status = health_of(address, service, timeout)
        if as_json:
            print_json({"address": address, "service": service, "status": status})
        else:
            typer.echo(status)
        if status != SERVING:
            raise typer.Exit(FAILURE_EXIT_CODE)


@commands.command()
def doctor(
    store: StoreUrl = None,
    model: Model = None,
    adapters: AdapterRoots = None,
    dtype: Dtype = None,
    address: Annotated[
        str | None,
        typer.Option(envvar=ADDRESS_VARIABLE, metavar="HOST:PORT", help="A router that must answer, if you have one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what a deployment stands on, and say what is wrong and what to do.

    Looks at Python, packages, memory, the store (puts, reads and deletes a value), the base model and every adapter
    (loads them as a worker would, which takes seconds), and the router. Settings count as for `up`. Exits with
    status 1 when anything is wrong.

    ```
    alora-serve doctor
    alora-serve doctor --adapters my/adapters --store redis://127.0.0.1:6379/0
    alora-serve doctor --address router.example:50051 --json
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli import doctor as examination
        from alora_serve.cli.local import DeploymentOptions

        options = DeploymentOptions(model=model, store_url=store, adapter_roots=tuple(adapters or ()), dtype=dtype)
        if not examination.run(options, address, as_json=as_json):
            raise typer.Exit(FAILURE_EXIT_CODE)


@commands.command()
def config(as_json: AsJson = False) -> None:
    """List every setting: flag, variable, default and meaning.

    The services read them from flags, ALORA_* variables and a YAML file, in this order.

    ```
    alora-serve config
    alora-serve config --json | jq '.[] | select(.variable == "ALORA_MAX_QUEUE")'
    ```
    """
    from alora_serve.config.groups import GROUPS
    from alora_serve.config.reference import configuration_rows

    names = ("flag", "variable", "default", "meaning")
    rows = {group: [dict(zip(names, row, strict=True)) for row in configuration_rows(group)] for group in GROUPS}
    if as_json:
        print_json(
            [{"group": group.__name__.removesuffix("Settings"), **row} for group in GROUPS for row in rows[group]]
        )
        return
    for group in GROUPS:
        print_table(f"{group.__name__.removesuffix('Settings')}: {group.__doc__}", rows[group])

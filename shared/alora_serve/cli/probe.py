"""The health of a server, asked once, in plain text: what container engines do that cannot speak gRPC themselves.

``python -m alora_serve.cli.probe HOST:PORT`` is ``alora-serve probe`` for every few seconds: without the command line,
and without all that this imports, it costs a quarter of the processor time.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs

from alora_serve.errors import UnavailableError
from alora_serve.rpc.channels import public_options

SERVING: Final = "SERVING"
TIMEOUT_SECONDS: Final = 2.0


def health_of(address: str, service: str, timeout_seconds: float) -> str:
    """``SERVING`` or another name of ``grpc.health.v1``.

    Raises:
        UnavailableError: it does not answer, or has no such service.
    """
    with grpc.insecure_channel(address, public_options(address)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds)
        except grpc.RpcError as error:
            raise UnavailableError(f"{address}: {error.code().name}: {error.details()}") from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main(address: str) -> int:
    """Print the health of the whole process behind ``address``; 0 when it is serving, else 1."""
    try:
        status = health_of(address, "", TIMEOUT_SECONDS)
    except UnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(status)
    return int(status != SERVING)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

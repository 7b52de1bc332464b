"""What a failed call means to who made it."""

from __future__ import annotations

from typing import Any, Final

import grpc

from alora_serve.errors import AloraServeError, RequestCancelledError, UnavailableError
from alora_serve.rpc.status import error_from_rpc, is_own_status

_CLOSED_HERE: Final = "Channel closed!"
"""gRPC's words for calls that run while their own channel is closed."""


def failure_of(call: grpc.RpcError) -> AloraServeError:
    """The call's status as an error of ours.

    A router says in words of its own why it cancels a call. gRPC's bare CANCELLED, of a call that nobody here
    cancelled, is a router in its last moments: it is as good as gone.
    """
    error, told = error_from_rpc(call), _details(call)
    if isinstance(error, RequestCancelledError) and not is_own_status(call) and told != _CLOSED_HERE:
        return UnavailableError("the router ended the call: it is shutting down")
    return error


def _details(call: Any) -> str:
    return str(call.details())

"""The connection to the router, made anew when its certificates change, and what is remembered of it."""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from alora_serve.client import AsyncClient, ModelInfo
from alora_serve.config.reloaded import Reloaded
from alora_serve.rpc.channels import message_bytes_for_context
from alora_serve.rpc.tls import ClientTls

MODEL_SECONDS: Final = 5.0
"""How long the base model's name may be out of date, during a rollout."""


class Router:
    """Whom requests are translated for. Belongs to one event loop."""

    def __init__(self, address: str, tls: ClientTls | None) -> None:
        """Prepare; the first call connects.

        Args:
            address: ``host:port``, or a gRPC name.
            tls: how to speak to it; None is plain text.

        Raises:
            ConfigError: a certificate cannot be read.
        """
        # What runs on an old connection keeps it open until it ends.
        self._connection = Reloaded(tls.files if tls else (), partial(_connect, address, tls))
        self._model: tuple[float, ModelInfo] | None = None

    def as_caller(self, api_key: str | None, request_id: str) -> AsyncClient:
        """A client that speaks for one request; with certificates that cannot be read now, by those before them."""
        return self._connection.content.on_behalf_of(api_key=api_key, request_id=request_id)

    async def model(self, caller: AsyncClient) -> ModelInfo:
        """The base model.

        Raises:
            AloraServeError: the router does not say.
        """
        if self._model is None or time.monotonic() - self._model[0] > MODEL_SECONDS:
            self._model = time.monotonic(), await caller.get_model()
        return self._model[1]

    async def most_bytes(self, caller: AsyncClient) -> int:
        """The longest request that the base model can need. Asked each time, so that the router judges the key.

        Raises:
            AloraServeError: the router does not let the caller in, or does not say.
        """
        return message_bytes_for_context((await caller.get_model()).context_tokens)

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Return once the router serves.

        Raises:
            UnavailableError: it does not in time.
        """
        await self._connection.content.wait_ready(timeout_seconds)

    async def close(self) -> None:
        """Close the connection; what still runs is cancelled."""
        await self._connection.content.close()


def _connect(address: str, tls: ClientTls | None) -> AsyncClient:
    if tls is None:
        return AsyncClient(address)
    return AsyncClient(address, credentials=tls.credentials(), server_name=tls.server_name)

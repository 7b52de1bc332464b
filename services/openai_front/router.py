"""The connection to the router, made anew when its certificates change, and what is remembered of it."""

from __future__ import annotations

import time
from typing import Final

from alora_serve.client import AsyncClient, ModelInfo
from alora_serve.config.file_version import FileVersion
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
        self._address = address
        self._tls = tls
        self._versions: tuple[FileVersion | None, ...] | None = None
        self._client = self._connect()
        self._model: tuple[float, ModelInfo] | None = None

    def as_caller(self, api_key: str | None, request_id: str) -> AsyncClient:
        """A client that speaks for one request."""
        if self._tls is not None and self._tls.versions() != self._versions:
            # What runs on the old connection keeps it open until it ends.
            self._client = self._connect()
        return self._client.on_behalf_of(api_key=api_key, request_id=request_id)

    async def model(self, caller: AsyncClient) -> ModelInfo:
        """The base model.

        Raises:
            AloraServeError: the router does not say.
        """
        if self._model is None or time.monotonic() - self._model[0] > MODEL_SECONDS:
            self._model = time.monotonic(), await caller.get_model()
        return self._model[1]

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Return once the router serves.

        Raises:
            UnavailableError: it does not in time.
        """
        await self._client.wait_ready(timeout_seconds)

    async def close(self) -> None:
        """Close the connection; what still runs is cancelled."""
        await self._client.close()

    def _connect(self) -> AsyncClient:
        if self._tls is None:
            return AsyncClient(self._address)
        self._versions = self._tls.versions()  # before reading: what changes meanwhile is read again
        return AsyncClient(self._address, credentials=self._tls.credentials(), server_name=self._tls.server_name)

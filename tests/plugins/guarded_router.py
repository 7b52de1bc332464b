"""A router that asks for TLS and keys, in front of a running deployment's services."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from alora_serve.client import AsyncClient
from alora_serve.rpc.tls import ClientTls
from deployment import PATIENCE_SECONDS, Deployed, another_router
from redis_servers import make_certificates
from tenants import key_of, write_access

TENANTS: dict[str, dict[str, int]] = {"user": {}, "small": {"max_sequences": 1}, "admin": {}}
"""Whose keys it takes: ``admin``'s is good for all, the others' for generating."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """Where it is."""

    address: str
    ca_file: Path
    server_file: Path

    @property
    def keys(self) -> dict[str, str]:
        """The tenants' keys."""
        return {name: key_of(name) for name in TENANTS}

    def client(self, tenant: str = "") -> AsyncClient:
        """Ours, with a tenant's key or none."""
        credentials = ClientTls(str(self.ca_file)).credentials()
        return AsyncClient(self.address, credentials=credentials, api_key=self.keys.get(tenant))


@asynccontextmanager
async def guarded_router(serving: Deployed, directory: Path) -> AsyncIterator[Guarded]:
    """It, once it serves."""
    files = make_certificates(directory)
    settings = {
        "tls_cert_file": str(files.server_file),
        "tls_key_file": str(files.server_file),
        "access_file": str(write_access(directory / "access.yaml", TENANTS, admins=["admin"])),
    }
    places = {name: process.address for name, process in serving.local.processes.items()}
    workers = [address for name, address in places.items() if name.startswith("worker")]
    async with another_router([places["prefill"]], workers, **settings) as router:
        guarded = Guarded(router.address, files.ca_file, files.server_file)
        async with guarded.client() as client:
            await client.wait_ready(PATIENCE_SECONDS)
        yield guarded

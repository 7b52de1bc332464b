"""Real processes that speak TLS to each other and know their callers: who is let in, what is shared, what is said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from alora_serve.client import AsyncClient, ChatMessage, GenerationResult, RetryPolicy
from alora_serve.errors import (
    AloraServeError,
    HandleInvalidError,
    OverloadedError,
    PermissionRefusedError,
    UnauthenticatedError,
    UnavailableError,
)
from alora_serve.rpc.tls import ClientTls
from deployment import BLOCK_TOKENS, GREEDY, PATIENCE_SECONDS, Deployed, ServedModel, deployed, metrics_page
from redis_servers import Certificates, make_certificates
from tenants import key_of, write_access

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

PUBLIC = "You are the assistant of a lighthouse. Answer in one sentence, and never speak of the weather to anybody."
SECRET_WORDS = "Quagga-Xylophon-Zwieback"
QUOTAS: dict[str, dict[str, int]] = {"acme": {}, "umbra": {}, "zephyr": {"max_sequences": 1}}


class Guarded:
    """A deployment under mutual TLS with three tenants."""

    def __init__(self, running: Deployed, files: Certificates, access_file: Path, log: list[str]) -> None:
        self.running, self.files, self.access_file, self.log = running, files, access_file, log

    @property
    def address(self) -> str:
        return self.running.local.router_address

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        client = str(self.files.client_file)
        return ClientTls(str(self.files.ca_file), client, client).credentials()

    def client(self, key: str | None, credentials: grpc.ChannelCredentials | None = None) -> AsyncClient:
        once = RetryPolicy(max_attempts=1)
        return AsyncClient(self.address, retry=once, credentials=credentials or self.credentials, api_key=key)

    async def ask(self, tenant: str, *turns: ChatMessage) -> GenerationResult:
        async with self.client(key_of(tenant)) as client:
            return await client.generate(turns, adapter="guard", sampling=GREEDY).result()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(tiny_model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    place = tmp_path_factory.mktemp("tenants")
    files = make_certificates(place)
    access_file = write_access(place / "access.yaml", QUOTAS)
    (place / "public.yaml").write_text(f'- "{PUBLIC}"\n')
    server, client = str(files.server_file), str(files.client_file)
    log: list[str] = []
    settings = {
        "tls_cert_file": server,
        "tls_key_file": server,
        "tls_client_ca_file": str(files.ca_file),
        "peer_tls_ca_file": str(files.ca_file),
        "peer_tls_cert_file": client,
        "peer_tls_key_file": client,
        "access_file": str(access_file),
        "public_prompts_file": str(place / "public.yaml"),
        "store_protection": "encrypt",
        "store_secrets": "a secret of the store of these tests",
        "block_tokens": str(BLOCK_TOKENS),
        "prefix_cache_bytes": "1",
    }
    credentials = ClientTls(str(files.ca_file), client, client).credentials()
    async with deployed(
        tiny_model,
        f"lmdb://{place}/kv",
        emit=lambda event: log.append(str(event)),
        credentials=credentials,
        api_key=key_of("acme"),
        **settings,
    ) as running:
        yield Guarded(running, files, access_file, log)


async def failure_of(client: AsyncClient) -> AloraServeError:
    async with client:
        with pytest.raises(AloraServeError) as caught:
            await client.list_adapters(timeout_seconds=10)
    return caught.value


async def test_answers_over_tls_from_an_encrypted_store_are_those_of_peft(guarded: Guarded) -> None:
    turns = [ChatMessage("user", "The sea is deep and salt, and ships go over it. Is it deep?")]
    handle = (await guarded.running.client.prefill(turns)).handle
    answer = await guarded.running.ask(handle, "guard")
    model = guarded.running.model
    assert answer.token_ids == model.cold_tokens("guard", model.prompt(handle, "guard"))
    assert answer.usage.fetched_tokens == len(handle.prefix_tokens)


async def test_who_shows_no_key_or_a_wrong_one_is_not_let_in(guarded: Guarded) -> None:
    for key in (None, "", "guess", key_of("acme") + "x"):
        assert isinstance(await failure_of(guarded.client(key)), UnauthenticatedError)


async def test_who_has_no_certificate_does_not_even_get_to_show_a_key(guarded: Guarded) -> None:
    without = ClientTls(str(guarded.files.ca_file)).credentials()
    assert isinstance(await failure_of(guarded.client(key_of("acme"), without)), UnavailableError)
    for name, listening in guarded.running.local.processes.items():
        async with AsyncClient(listening.address, retry=RetryPolicy(max_attempts=1)) as plain:
            assert isinstance(await failure_of(plain), UnavailableError), name


async def test_a_key_for_generating_changes_nothing_for_others(guarded: Guarded) -> None:
    async with guarded.client(key_of("acme")) as client:
        with pytest.raises(PermissionRefusedError):
            await client.load_adapter("guard")


async def test_tenants_share_no_kv_and_no_handles_but_what_is_public(guarded: Guarded) -> None:
    secret = ChatMessage("user", "Our merger is called Bluebird, and it closes in May. " * 3)
    first = await guarded.ask("acme", secret)
    again = await guarded.ask("acme", secret)
    other = await guarded.ask("umbra", secret)
    assert first.token_ids == again.token_ids == other.token_ids
    assert again.usage.fetched_tokens > 0
    assert other.usage.fetched_tokens == 0, "another tenant's KV"

    public = ChatMessage("system", PUBLIC)
    await guarded.ask("acme", public, ChatMessage("user", "Who lights the lamp?"))
    shared = await guarded.ask("umbra", public, ChatMessage("user", "Who sweeps the stairs?"))
    assert BLOCK_TOKENS <= shared.usage.fetched_tokens < shared.usage.prompt_tokens

    async with guarded.client(key_of("acme")) as one, guarded.client(key_of("umbra")) as two:
        handle = (await one.prefill([secret])).handle
        with pytest.raises(HandleInvalidError):
            await two.generate(handle=handle, adapter="guard", sampling=GREEDY).result()


async def test_a_tenant_over_its_quota_is_told_when_to_come_back_and_others_are_not_held_up(guarded: Guarded) -> None:
    turns = [ChatMessage("user", "Count the gulls.")]
    async with guarded.client(key_of("zephyr")) as small, guarded.client(key_of("umbra")) as two:
        stream = small.generate(turns, adapter="guard", max_tokens=1500, ignore_eos=True)
        await anext(aiter(stream))
        with pytest.raises(OverloadedError, match="max_sequences") as caught:
            await small.generate(turns, adapter="guard", sampling=GREEDY).result()
        assert caught.value.retry_after_seconds
        await two.generate(turns, adapter="guard", sampling=GREEDY).result()
        await stream.close()


async def test_keys_rotate_while_the_router_runs(guarded: Guarded) -> None:
    fresh = "a-fresh-key-of-one-" + "y" * 24
    write_access(guarded.access_file, QUOTAS, **{fresh: "acme"})

    async def is_taken(key: str) -> bool:
        async with guarded.client(key) as client:
            try:
                await client.list_adapters(timeout_seconds=10)
            except UnauthenticatedError:
                return False
            return True

    async def becomes(taken: bool) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await is_taken(fresh) is not taken:  # noqa: ASYNC110  # asked over the network
                await asyncio.sleep(0.1)

    await becomes(True)
    assert await is_taken(key_of("acme")), "the old key goes when it is taken out"
    write_access(guarded.access_file, QUOTAS)
    await becomes(False)


async def test_neither_logs_nor_metrics_say_what_was_asked_or_with_which_key(guarded: Guarded) -> None:
    await guarded.ask("acme", ChatMessage("user", SECRET_WORDS))
    pages = [
        await asyncio.to_thread(metrics_page, listening.metrics_address)
        for listening in guarded.running.local.processes.values()
    ]
    told = "\n".join([*guarded.log, *pages])
    assert "listening" in told
    keys = [key_of(tenant) for tenant in QUOTAS]
    for word in (*SECRET_WORDS.split("-"), *keys, *QUOTAS, "a secret of the store"):
        assert word not in told
    assert not any('tenant="' in page for page in pages), "what a tenant hits is nobody else's business"

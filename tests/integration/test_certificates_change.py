"""Another authority takes over on every hop of a running deployment: no request fails, and the old one is forgotten."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alora_serve.client import AsyncClient, ChatMessage, RetryPolicy
from alora_serve.errors import AloraServeError, UnavailableError
from alora_serve.rpc.tls import ClientTls
from deployment import BLOCK_TOKENS, GREEDY, PATIENCE_SECONDS, ServedModel, deployed
from openai_front.router import Router
from redis_servers import Certificates, make_certificates

TURNS = [ChatMessage("user", "The clock has struck, and the shop is shut. Is it shut?")]
ONCE, PATIENT = RetryPolicy(max_attempts=1), RetryPolicy(max_attempts=100)


def replace_file(file: Path, *parts: Path) -> None:
    """By the contents of the others, at once."""
    beside = file.with_suffix(".new")
    beside.write_bytes(b"".join(part.read_bytes() for part in parts))
    beside.replace(file)


def tls_of(files: Certificates) -> ClientTls:
    return ClientTls(str(files.ca_file), str(files.client_file), str(files.client_file))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
async def test_an_authority_is_replaced_without_a_failed_request(tiny_model: ServedModel, tmp_path: Path) -> None:
    for name in ("old", "new", "used"):
        (tmp_path / name).mkdir()
    old, new = make_certificates(tmp_path / "old"), make_certificates(tmp_path / "new")
    shutil.copytree(tmp_path / "old", tmp_path / "used", dirs_exist_ok=True)
    used = Certificates(*(tmp_path / "used" / f"{name}.pem" for name in ("ca", "server", "client", "expired")))
    log: list[str] = []
    server, client = str(used.server_file), str(used.client_file)
    settings = {
        "tls_cert_file": server,
        "tls_key_file": server,
        "tls_client_ca_file": str(used.ca_file),
        "peer_tls_ca_file": str(used.ca_file),
        "peer_tls_cert_file": client,
        "peer_tls_key_file": client,
        "resolve_seconds": "0.2",
        "block_tokens": str(BLOCK_TOKENS),
    }
    async with deployed(
        tiny_model,
        f"lmdb://{tmp_path}/kv",
        workers=2,
        emit=lambda event: log.append(str(event)),
        credentials=tls_of(used).credentials(),
        **settings,
    ) as running:
        address = running.local.router_address
        handle = (await running.client.prefill(TURNS)).handle
        expected = tiny_model.cold_tokens("guard", tiny_model.prompt(handle, "guard"))
        front = Router(address, tls_of(used))
        assert await front.as_caller(None, "before").get_model()
        failures, answers, stop = list[str](), list[tuple[int, ...]](), asyncio.Event()

        async def ask(retry: RetryPolicy) -> None:
            while not stop.is_set():
                credentials = tls_of(used).credentials()
                try:
                    async with AsyncClient(address, retry=retry, credentials=credentials) as caller:
                        stream = caller.generate(TURNS, adapter="guard", sampling=GREEDY, timeout_seconds=60)
                        answers.append((await stream.result()).token_ids)
                except AloraServeError as error:
                    failures.append(repr(error))

        def reconnected() -> int:
            return sum("certificates changed" in line for line in log)

        asking = [asyncio.create_task(ask(ONCE)) for _ in range(3)]  # connections that are made anew fail nobody
        before = 0
        for step in (
            [(used.ca_file, old.ca_file, new.ca_file)],  # both are trusted
            [(used.server_file, new.server_file), (used.client_file, new.client_file)],
            [(used.ca_file, new.ca_file)],
        ):
            for file, *parts in step:
                replace_file(file, *parts)
            await until(lambda: reconnected() > before)  # noqa: B023  # read at once
            before, answered = reconnected(), len(answers)
            await until(lambda: len(answers) > answered + 3)  # noqa: B023
        stop.set()
        await asyncio.gather(*asking)
        stop.clear()
        asking = [asyncio.create_task(ask(PATIENT)) for _ in range(3)]
        # Whoever starts now knows nothing of the old authority.
        for name in (running.local.worker_names[0], "router"):
            await running.local.restart(name)
        answered = len(answers)
        await until(lambda: len(answers) > answered + 3)
        stop.set()
        await asyncio.gather(*asking)
        assert failures == []
        assert set(answers) == {expected}
        assert await front.as_caller(None, "after").get_model(), "the front door's connection is made anew"
        await front.close()
        async with AsyncClient(address, retry=ONCE, credentials=tls_of(old).credentials()) as of_old:
            with pytest.raises(UnavailableError):
                await of_old.list_adapters(timeout_seconds=10)

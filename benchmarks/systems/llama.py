"""llama-server as a system: our model in the same dtype, every adapter loaded, prompts as token arrays."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any, Self

from adapters import Adapter
from harness import OUTPUT
from systems.base import Answer, FanOutAnswers, Warmed, in_turn
from systems.llama_settings import LlamaSettings

from alora_serve.cores import usable_cores
from alora_serve.types import TokenIds

_READY_SECONDS = 120.0
_CALL_SECONDS = 900.0


class LlamaServer:
    """A llama-server process while the block runs."""

    plain = False

    def __init__(
        self,
        server: Path,
        model: Path,
        flags: Sequence[str],
        adapters: Sequence[tuple[Adapter, Path]],
        settings: LlamaSettings,
    ) -> None:
        """``flags`` are all but those for slots, threads and what is loaded; adapters come with their GGUF files."""
        self.name = settings.name
        self._settings = settings
        self._ids = {adapter.name: index for index, (adapter, _) in enumerate(adapters)}
        self._slots: dict[TokenIds, int] = {}
        self._port = _free_port()
        self.command = [
            *(str(server), "--model", str(model), "--host", "127.0.0.1", "--port", str(self._port)),
            *("--parallel", str(settings.slots), "--ctx-size", str(settings.slots * settings.context_tokens)),
            *("--threads", str(usable_cores()), "--lora-init-without-apply", "--no-webui"),
            *flags,
        ]
        self.command += ["--lora", ",".join(str(path) for _, path in adapters)]
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="llama-client")
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        with (OUTPUT / "llama-server.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*self.command, stdout=log, stderr=log)
        try:
            await self._wait_ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.terminate()
            await process.wait()

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Evaluate a conversation with the base model into a slot's cache."""
        began = perf_counter()
        answer = await self._call(prefix, (), None, 0)
        timings = answer["timings"]
        # Its own clock, which is kinder to it than ours.
        computed, seconds = timings.get("prompt_n", 0), timings.get("prompt_ms", 0.0) / 1e3
        return Warmed(int(computed), seconds or perf_counter() - began)

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        """One streamed completion."""
        began = perf_counter()
        answer = await self._call(prefix, adapter.invocation if adapter else (), adapter, max_tokens)
        timings = answer["timings"]
        notes = {
            "cached_tokens": float(timings.get("cache_n", 0)),
            "computed_tokens": float(timings.get("prompt_n", 0)),
            "step_seconds": step_seconds(timings),
        }
        return Answer(tuple(answer["tokens"]), answer["first"] - began, answer["last"] - began, notes)

    async def fan_out(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> FanOutAnswers:
        """One after another, or all at once."""
        if not self._settings.concurrent:
            return in_turn([await self.ask(prefix, adapter, max_tokens) for adapter in adapters])
        began = perf_counter()
        answers = await asyncio.gather(*(self.ask(prefix, adapter, max_tokens) for adapter in adapters))
        return FanOutAnswers(tuple(answers), perf_counter() - began)

    async def _call(
        self, prefix: TokenIds, invocation: TokenIds, adapter: Adapter | None, max_tokens: int
    ) -> dict[str, Any]:
        uninvoked = 0 if self._settings.base_keeps_cache else -1
        chosen = self._ids[adapter.name] if adapter else uninvoked
        body = {
            "prompt": prefix + invocation,
            "n_predict": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": True,
            "stream": True,
            "return_tokens": True,
            "lora": [{"id": number, "scale": float(number == chosen)} for number in self._ids.values()],
        }
        if self._settings.pin_slot:
            body["id_slot"] = self._slots.setdefault(prefix, len(self._slots) % self._settings.slots)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._stream, json.dumps(body))

    def _stream(self, body: str) -> dict[str, Any]:
        """Read one completion's server-sent events: tokens, when the first and the last came, and its timings."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_CALL_SECONDS)
        tokens: list[int] = []
        first = 0.0
        try:
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"llama-server answered {response.status}: {response.read(500)!r}")
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                tokens += event.get("tokens", [])
                if tokens and not first:
                    first = perf_counter()
                if event.get("stop"):
                    last = perf_counter()
                    return {"tokens": tokens, "first": first or last, "last": last, "timings": event["timings"]}
        finally:
            connection.close()
        raise RuntimeError("llama-server ended a stream without its last event")

    async def _wait_ready(self) -> None:
        deadline = monotonic() + _READY_SECONDS
        while monotonic() < deadline:
            if self._process is None or self._process.returncode is not None:
                raise RuntimeError(f"llama-server ended at its start; see {OUTPUT / 'llama-server.log'}")
            if await asyncio.to_thread(self._healthy):
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"llama-server was not ready after {_READY_SECONDS:g} s")

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False  # it does not listen yet
        finally:
            connection.close()


def step_seconds(timings: Mapping[str, float]) -> float:
    """Mean time between two tokens by llama-server's own clock, which no socket delays; 0 of a single token.

    Its clock starts when the first token is there, so that n tokens are n - 1 steps.
    """
    return timings.get("predicted_ms", 0.0) / 1e3 / max(1.0, timings.get("predicted_n", 0) - 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The live set of endpoints of one service: found by name, watched over a status stream, leased to requests.

An endpoint is healthy while its status stream answers. A call that finds it unreachable makes it unhealthy at once;
only the stream makes it healthy again. Everything here runs on one event loop, so a pick and the count of what it
picked are one step: nothing else runs between them.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import structlog
from grpc import aio

from adapter_router.endpoints.endpoint import STATES, Endpoint, EndpointOptions
from adapter_router.endpoints.resolver import Resolver, resolve_target
from adapter_router.policy import Demand, EndpointSnapshot, eligible, pick
from alora_serve.errors import AloraServeError, ConfigError, UnavailableError
from alora_serve.metrics import EndpointRole, RouterMetrics
from alora_serve.types import EndpointStatus, ModelInfo

StubT = TypeVar("StubT")

_BACKOFF_SECONDS = (0.2, 0.4, 0.8, 1.6)
"""Longest pause before a status stream that keeps failing is opened again."""


@dataclass(frozen=True, slots=True)
class Lease(Generic[StubT]):
    """A place on an endpoint, and when its first token was predicted there; 0 when nothing was."""

    endpoint: Endpoint[StubT]
    predicted_seconds: float


class EndpointSet(Generic[StubT]):
    """All endpoints of one service. An async context manager: entering looks the targets up and starts the watches.

    ``looking`` is the task that looks them up again and again; it ends with the context, or by a defect.
    """

    looking: asyncio.Task[None]

    def __init__(
        self,
        service: EndpointRole,
        targets: Sequence[str],
        *,
        connect: Callable[[str], aio.Channel],
        make_stub: Callable[[aio.Channel], StubT],
        watch: Callable[[StubT], AsyncGenerator[EndpointStatus, None]],
        options: EndpointOptions,
        metrics: RouterMetrics,
        on_change: Callable[[], None],
        resolve: Resolver = resolve_target,
        certificates: Callable[[], object] = tuple,
    ) -> None:
        """Prepare; nothing runs before the context is entered.

        Args:
            service: for logs, errors and metrics (``base_prefill``).
            targets: ``host:port`` each, names or addresses.
            connect: opens a channel to an address.
            make_stub: the service's stub on a channel.
            watch: the status stream on a stub; waits for the connection, ends or raises when the stream does.
            options: see :class:`EndpointOptions`.
            metrics: told of picks and health.
            on_change: called after health, status or membership changed.
            resolve: looks a target up.
            certificates: another value once the files that ``connect`` reads have changed.
        """
        self.service = service
        self._targets = tuple(targets)
        self._connect, self._make_stub, self._watch, self._resolve = connect, make_stub, watch, resolve
        self._certificates, self._connected_with = certificates, certificates()
        self._options = options
        self._metrics = metrics
        self._on_change = on_change
        self._members: dict[str, Endpoint[StubT]] = {}
        self._known: dict[str, frozenset[str]] = {target: frozenset() for target in targets}
        self._watches: dict[Endpoint[StubT], asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._log = structlog.get_logger(__name__).bind(role=service)  # "service" is the process in every line

    async def __aenter__(self) -> Self:
        if self._targets:
            self._announce()  # none is healthy yet: without a series of that, no alert could tell
        await self.refresh()
        self.looking = asyncio.create_task(self._resolve_forever(), name=f"resolve {self.service}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (tasks := [*self._watches.values(), *self._closing, self.looking]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self._members.values():
            await endpoint.channel.close()
        self._members.clear()

    def members(self) -> list[Endpoint[StubT]]:
        """Current endpoints, healthy or not."""
        return list(self._members.values())

    def models(self) -> list[ModelInfo]:
        """The base model of each endpoint that has reported one, healthy or not."""
        return [endpoint.status.model for endpoint in self._members.values() if endpoint.status]

    def snapshots(self) -> list[EndpointSnapshot]:
        """What is known now."""
        return [endpoint.snapshot() for endpoint in self._members.values()]

    @asynccontextmanager
    async def lease(
        self, demand: Demand, *, avoid: Collection[str] = (), wait_seconds: float | None = None
    ) -> AsyncIterator[Lease[StubT]]:
        """Hold one place on the endpoint that ``demand`` prefers, waiting ``wait_seconds`` at most for one to be fit.

        Unset, that is as long as the set's options say.

        Endpoints in ``avoid`` failed this request already: they are taken only when no other may be.

        Raises:
            UnavailableError: no endpoint may take it.
        """
        lease = await self._take(demand, avoid, self._options.wait_seconds if wait_seconds is None else wait_seconds)
        try:
            yield lease
        finally:
            lease.endpoint.give_back(demand)
            self._close_if_idle(lease.endpoint)

    def has_other(self, demand: Demand, avoid: Collection[str]) -> bool:
        """An endpoint outside ``avoid`` may take a request now."""
        return any(endpoint.address not in avoid for endpoint in eligible(self.snapshots(), demand))

    def mark_unreachable(self, endpoint: Endpoint[StubT]) -> None:
        """A call found it unreachable: it takes nothing until its status stream answers."""
        if endpoint.healthy:
            endpoint.healthy = False
            self._log.warning("endpoint unreachable", address=endpoint.address)
            self._announce()

    def note_first_token(self, lease: Lease[StubT], seconds: float) -> None:
        """The first token came so long after the endpoint was picked."""
        if lease.predicted_seconds:
            self._metrics.predicted(self.service, lease.predicted_seconds, seconds)

    def note_retry(self) -> None:
        """A request is tried again."""
        self._metrics.retried(self.service)

    def note_resume(self) -> None:
        """A stream goes on from the middle."""
        self._metrics.resumed(self.service)

    async def refresh(self) -> None:
        """Look every target up once; add what is new, retire what is gone. A failed look-up keeps what was known.

        Raises ConfigError when a file that connections are made with cannot be read, or a target is not ``host:port``.
        """
        for target in self._targets:
            try:
                self._known[target] = await self._resolve(target)
            except UnavailableError as error:
                self._log.warning("name not resolved", target=target, error=str(error))
        wanted = frozenset[str]().union(*self._known.values())
        for address in self._members.keys() - wanted:
            self._retire(self._members.pop(address))
        for address in sorted(wanted - self._members.keys()):
            self._admit(address, self._connect(address))

    # --- picking ------------------------------------------------------------------------------------------------------

    async def _take(self, demand: Demand, avoid: Collection[str], wait_seconds: float) -> Lease[StubT]:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                while True:
                    lease = self._try_take(demand, avoid) or self._try_take(demand, ())
                    if lease is not None:
                        return lease
                    await self._changed.wait()
        what = f"adapter {demand.adapter!r}" if demand.adapter else "the base model"
        raise UnavailableError(f"no {self.service} endpoint can take a request for {what} now; retry later")

    def _try_take(self, demand: Demand, avoid: Collection[str]) -> Lease[StubT] | None:
        """Pick and count in one step."""
        choice = pick(self.snapshots(), demand, load_factor=self._options.load_factor, avoid=avoid)
        if choice is None:
            return None
        endpoint = self._members[choice.address]
        endpoint.take(demand)
        if demand.together is not None:
            demand.together.add(choice.address)
        self._metrics.picked(self.service, choice.reason)
        return Lease(endpoint, choice.predicted_seconds)

    # --- membership ---------------------------------------------------------------------------------------------------

    async def _resolve_forever(self) -> None:
        while True:
            await asyncio.sleep(self._options.resolve_seconds)
            for look in (self._reconnect, self.refresh):
                try:
                    await look()
                except ConfigError as error:
                    self._log.error("cannot connect, old connections stay for now", error=str(error))

    async def _reconnect(self) -> None:
        """New connections to all if certificates have changed; running requests end on the old ones."""
        certificates = self._certificates()
        if certificates == self._connected_with:
            return
        for address, before in tuple(self._members.items()):
            self._admit(address, self._connect(address), before)
        self._connected_with = certificates
        self._log.info("certificates changed, connected anew")

    def _admit(self, address: str, channel: aio.Channel, before: Endpoint[StubT] | None = None) -> None:
        """Let it take requests once it is healthy: at once if it takes the place of one that is."""
        endpoint = Endpoint(address, channel, self._make_stub(channel))
        self._members[address] = endpoint
        if before is not None:
            endpoint.succeed(before)
            self._retire(before)
        self._watches[endpoint] = asyncio.create_task(self._watch_forever(endpoint), name=f"watch {address}")
        self._log.info("endpoint added", address=address)
        self._announce()

    def _retire(self, endpoint: Endpoint[StubT]) -> None:
        """No member now; running requests keep the channel, and the watch that sees it hang, until the last ends."""
        endpoint.retired = True
        self._close_if_idle(endpoint)
        self._log.info("endpoint removed", address=endpoint.address, in_flight=endpoint.in_flight)
        self._announce()

    def _close_if_idle(self, endpoint: Endpoint[StubT]) -> None:
        if endpoint.retired and not endpoint.in_flight:
            self._watches.pop(endpoint).cancel()
            task = asyncio.create_task(endpoint.channel.close(), name=f"close {endpoint.address}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # --- health -------------------------------------------------------------------------------------------------------

    async def _watch_forever(self, endpoint: Endpoint[StubT]) -> None:
        failures = 0
        while True:
            try:
                async with aclosing(self._watch(endpoint.stub)) as statuses:
                    while (status := await self._next_status(statuses)) is not None:
                        failures = 0
                        self._report(endpoint, status)
                cause = "status stream ended"
            except aio.AioRpcError as error:
                cause = f"{error.code().name}: {error.details()}"
            except AloraServeError as error:
                cause = f"unreadable status: {error}"
            except TimeoutError:
                cause = f"no status for {self._options.silence_seconds:g} s"
                endpoint.silent.set()
            if endpoint.healthy or failures == 0:
                self._log.warning("endpoint unhealthy", address=endpoint.address, cause=cause)
            endpoint.healthy = False
            self._announce()
            # A stream that had answered is reopened at once: a server may end long connections on purpose.
            await asyncio.sleep(_backoff_seconds(failures))
            failures += 1

    async def _next_status(self, statuses: AsyncIterator[EndpointStatus]) -> EndpointStatus | None:
        async with asyncio.timeout(self._options.silence_seconds):
            return await anext(statuses, None)

    def _report(self, endpoint: Endpoint[StubT], status: EndpointStatus) -> None:
        if not endpoint.healthy:
            self._log.info("endpoint healthy", address=endpoint.address)
        if endpoint.report(status):
            self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        states = Counter(endpoint.state for endpoint in self._members.values())
        for state in STATES:
            self._metrics.endpoints(self.service, state, states[state])
        self._on_change()


def _backoff_seconds(failures: int) -> float:
    if not failures:
        return 0
    longest = _BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS)) - 1]
    return random.uniform(longest / 2, longest)

"""Both clients on real sockets: against a router with scripted services behind it, and against a scripted router."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from alora_serve.client import (
    AsyncClient,
    Client,
    ContinuationScore,
    Finished,
    FinishReason,
    GenerationStream,
    Heartbeat,
    RetryPolicy,
    Started,
    TokenChunk,
    TokenizedPrompt,
)
from alora_serve.errors import (
    AdapterNotFoundError,
    AloraServeError,
    DeadlinePassedError,
    IntrinsicOutputError,
    IntrinsicUndefinedError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
)
from alora_serve.rpc.channels import DEFAULT_MESSAGE_BYTES, MAX_MESSAGE_BYTES
from alora_serve.rpc.convert import event_to_proto, pack_token_ids
from alora_serve.rpc.convert.sampling import read_resume
from alora_serve.rpc.convert.violations import Violations
from alora_serve.rpc.health import HealthServicer
from alora_serve.rpc.status import MessageTooLargeError
from alora_serve.types import GenerateRequest
from alora_serve.v1 import alora_pb2, types_pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceServicer, add_AloraServiceServicer_to_server
from fake_services import (
    SIGNER,
    FakePrefill,
    FakeWorker,
    Server,
    answer,
    deployment,
    handle,
    healthy,
    start_server,
    until,
)

AnyClient: TypeAlias = Client | AsyncClient
FAST = RetryPolicy(backoff_seconds=0.01)


async def done(value: Any) -> Any:
    """The value of either kind of call."""
    return await value if inspect.isawaitable(value) else value


async def run(client: AnyClient, work: Callable[[AnyClient], Any]) -> Any:
    """The result of ``work``; what a synchronous client does blocks a thread of its own."""
    return await asyncio.to_thread(work, client) if isinstance(client, Client) else await done(work(client))


async def events_of(client: AnyClient, open_stream: Callable[[AnyClient], Any]) -> list[Any]:
    if isinstance(client, Client):
        return await asyncio.to_thread(lambda: list(open_stream(client)))
    return [event async for event in open_stream(client)]


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Any:
    """Opens a client of one of the two kinds for a block."""

    @asynccontextmanager
    async def connected(address: str, **options: Any) -> AsyncIterator[AnyClient]:
        client = request.param(address, **options)
        try:
            yield client
        finally:
            await done(client.close())

    return connected


async def test_a_stream_is_iterated_event_by_event(connect: Any) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _), connect(router.address) as client:
        events = await events_of(client, lambda c: c.generate("Hi", adapter="jailbreak", seed=3))
        assert isinstance(events[0], Started)
        assert events[0].seed == 3
        assert [event.text for event in events if isinstance(event, TokenChunk)] == ["Hello", " world"]
        assert isinstance(events[-1], Finished)


async def test_a_result_is_the_whole_answer(connect: Any) -> None:
    worker = FakeWorker()
    async with deployment([FakePrefill()], [worker]) as (router, _), connect(router.address) as client:
        result = await run(client, lambda c: c.generate("Hi", max_tokens=7).result())
        assert (result.text, result.token_ids, result.finish_reason) == ("Hello world!", (10, 11), FinishReason.STOP)
        assert result.usage.prompt_tokens == 2
        assert worker.requests[0].sampling.max_tokens == 7
        SIGNER.verify(result.handle)
        again = await run(client, lambda c: c.generate(handle=result.handle, adapter="jailbreak").result())
        assert again.handle is None


async def test_text_grows_while_a_stream_is_read(connect: Any) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _), connect(router.address) as client:
        stream = client.generate("Hi")
        assert stream.text == ""
        assert (await run(client, lambda c: stream.result())).text == stream.text == "Hello world!"


async def test_a_fan_out_gives_events_by_index_and_results_in_order(connect: Any) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _), connect(router.address) as client:
        events = await events_of(client, lambda c: c.fanout("Hi", ["jailbreak", "nope", None]))
        assert {index for index, _ in events} == {0, 1, 2}
        assert next(event for index, event in events if index == 1).reason == "ADAPTER_NOT_FOUND"
        first, second, third = await run(
            client, lambda c: c.fanout(None, ["jailbreak", "nope", None], handle=handle()).results()
        )
        assert first.text == third.text == "Hello world!"
        assert isinstance(second, AdapterNotFoundError)


async def test_tokens_are_told_and_nothing_is_computed(connect: Any) -> None:
    prefill = FakePrefill()
    async with deployment([prefill], [FakeWorker()]) as (router, _), connect(router.address) as client:
        tokenized = await run(client, lambda c: c.tokenize([{"role": "user", "content": "Hi"}]))
        assert tokenized == TokenizedPrompt((1,), handle().generation_prompt_tokens)
        assert prefill.requests[0].tokenize_only
        assert (await run(client, lambda c: c.tokenize(handle=handle()))).prefix_tokens == handle().prefix_tokens


async def test_scores_come_in_the_order_asked(connect: Any) -> None:
    worker = FakeWorker()
    async with deployment([FakePrefill()], [worker]) as (router, _), connect(router.address) as client:
        result = await run(client, lambda c: c.score("Hi", ["ab", "c"], adapter="jailbreak"))
        assert result.scores == (ContinuationScore((97, 98), (-1.0, -1.0)), ContinuationScore((99,), (-1.0,)))
        assert [score.total for score in result.scores] == [-2.0, -1.0]
        assert (worker.scored[0].adapter, result.usage.prompt_tokens) == ("jailbreak", 1)
        await run(client, lambda c: c.score(None, ["x"], handle=handle()))
        assert worker.scored[1].adapter == ""


async def test_prefill_adapters_and_model(connect: Any) -> None:
    worker = FakeWorker()
    async with deployment([FakePrefill()], [worker]) as (router, _), connect(router.address) as client:
        prefilled = await run(client, lambda c: c.prefill([{"role": "user", "content": "Hi"}]))
        assert prefilled.handle.prefix_tokens == (1,)
        assert [a.name for a in await run(client, lambda c: c.list_adapters())] == [
            "broken",
            "certainty",
            "jailbreak",
            "plain",
        ]
        assert (await run(client, lambda c: c.load_adapter("jailbreak"))).resident
        assert await run(client, lambda c: c.unload_adapter("jailbreak"))
        assert not await run(client, lambda c: c.unload_adapter("certainty"))
        assert (worker.loaded, worker.unloaded) == (["jailbreak"], ["jailbreak", "certainty"])
        assert (await run(client, lambda c: c.get_model())).context_tokens == 256


async def test_errors_are_ours_with_all_details(connect: Any) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _), connect(router.address) as client:
        with pytest.raises(InvalidRequestError) as caught:
            await run(client, lambda c: c.generate("Hi", top_p=0).result())
        assert caught.value.violations[0].field == "sampling.top_p"
        assert caught.value.metadata["request_id"]
        with pytest.raises(AdapterNotFoundError, match="nearest: jailbreak"):
            await run(client, lambda c: c.load_adapter("jailbrake"))


async def test_a_time_out_is_ours_and_reaches_the_worker(connect: Any) -> None:
    async def never(request: GenerateRequest, attempt: int) -> Any:
        await asyncio.Event().wait()
        yield await anext(answer(request, attempt))

    worker = FakeWorker(never)
    async with deployment([FakePrefill()], [worker]) as (router, _), connect(router.address) as client:
        with pytest.raises(DeadlinePassedError):
            await run(client, lambda c: c.generate("Hi", timeout_seconds=0.3).result())
        await until(lambda: worker.cancelled == 1)


def endless_worker() -> FakeWorker:
    async def endless(request: GenerateRequest, attempt: int) -> Any:
        async for event in answer(request, attempt):
            yield event
            await asyncio.Event().wait()

    return FakeWorker(endless)


async def test_leaving_a_sync_stream_cancels_it() -> None:
    worker = endless_worker()
    async with deployment([FakePrefill()], [worker]) as (router, _):

        def read_one(client: Client) -> tuple[GenerationStream, list[Any]]:
            with client.generate("Hi") as stream:
                next(stream)
            return stream, list(stream)

        with Client(router.address) as client:
            # The stream is kept, so that it is not its end that cancels the call.
            _stream, rest = await asyncio.to_thread(read_one, client)
            assert rest == []
            await until(lambda: worker.cancelled == 1)


async def test_leaving_an_async_stream_cancels_it() -> None:
    worker = endless_worker()
    async with deployment([FakePrefill()], [worker]) as (router, _), AsyncClient(router.address) as client:
        async with client.generate("Hi") as stream:
            await anext(stream)
        assert [event async for event in stream] == []
        await until(lambda: worker.cancelled == 1)


async def test_dropping_a_sync_stream_cancels_it() -> None:
    worker = endless_worker()
    async with deployment([FakePrefill()], [worker]) as (router, _):

        def read_one(client: Client) -> None:
            for _ in client.generate("Hi"):
                break

        with Client(router.address) as client:
            await asyncio.to_thread(read_one, client)
            await until(lambda: worker.cancelled == 1)


async def test_dropping_an_async_stream_cancels_it() -> None:
    worker = endless_worker()
    async with deployment([FakePrefill()], [worker]) as (router, _), AsyncClient(router.address) as client:
        async for _ in client.generate("Hi"):
            break
        await until(lambda: worker.cancelled == 1)


async def test_an_async_stream_that_is_no_longer_read_loses_its_place_at_the_worker() -> None:
    async def flood(request: GenerateRequest, attempt: int) -> Any:
        async for event in answer(request, attempt):
            yield event
            while isinstance(event, TokenChunk):
                # Large, since the windows of two hops swallow thousands of small ones.
                yield TokenChunk(event.token_ids, "x" * 200_000)

    worker = FakeWorker(flood)
    async with (
        deployment([FakePrefill()], [worker], write_timeout_seconds=0.3) as (router, _),
        AsyncClient(router.address) as client,
    ):
        stream = client.generate("Hi")
        assert isinstance(await anext(stream), Started)
        await until(lambda: worker.cancelled == 1)
        assert router.metric("alora_router_in_flight") == 0
        with pytest.raises(RequestCancelledError, match=r"took no message for 0\.3 s"):
            await stream.result()
        assert healthy(router.workers) == 1, "it is not the worker's fault"


async def test_closing_an_async_stream_ends_its_reader_and_cancels_no_task() -> None:
    worker = endless_worker()
    async with deployment([FakePrefill()], [worker]) as (router, _), AsyncClient(router.address) as client:
        stream = client.generate("Hi")
        reader = asyncio.create_task(_collect(stream))
        await until(lambda: len(worker.requests) == 1)
        await stream.close()
        assert len(await reader) <= 1
        with pytest.raises(UnavailableError):
            await stream.result()


async def test_closing_the_async_client_fails_its_readers() -> None:
    worker = endless_worker()
    async with deployment([FakePrefill()], [worker]) as (router, _):
        client = AsyncClient(router.address)
        reader = asyncio.create_task(_collect(client.generate("Hi")))
        await until(lambda: len(worker.requests) == 1)
        await client.close()
        with pytest.raises(RequestCancelledError):
            await reader


async def test_cancelling_the_reading_task_cancels_the_call() -> None:
    worker = endless_worker()
    async with deployment([FakePrefill()], [worker]) as (router, _), AsyncClient(router.address) as client:
        reader = asyncio.create_task(_collect(client.generate("Hi")))
        await until(lambda: len(worker.requests) == 1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await until(lambda: worker.cancelled == 1)


@pytest.mark.parametrize("failures", [[], [UnavailableError("gone")]], ids=["reading", "looking for a router"])
async def test_a_stream_of_which_a_read_was_cancelled_is_no_whole_answer(failures: list[AloraServeError]) -> None:
    router = ScriptedRouter(*failures, hang, after=2)
    retry = RetryPolicy(backoff_seconds=60.0, max_backoff_seconds=60.0, begin_seconds=600.0, resume_seconds=600.0)
    async with router.served() as server, AsyncClient(server.address, retry=retry) as client:
        stream = client.generate("Hi")
        assert [type(await anext(stream)) for _ in range(2)] == [Started, Heartbeat]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.5)
        assert not failures or len(router.failures) == 1
        for read_on in (lambda: anext(stream), stream.result):
            with pytest.raises(RequestCancelledError, match="earlier read of this stream was cancelled"):
                await read_on()
        await stream.close()
        assert [event async for event in stream] == [], "it ends for who has closed it"


async def test_a_read_that_was_cancelled_once_all_had_come_has_lost_nothing() -> None:
    router = ScriptedRouter(hang, after=5)
    async with router.served() as server, AsyncClient(server.address) as client:
        stream = client.generate("Hi")
        assert isinstance([await anext(stream) for _ in range(5)][-1], Finished)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.2)
        assert (await stream.result()).text == "Hello world!"


async def _collect(stream: Any) -> list[Any]:
    return [event async for event in stream]


Silence = Callable[[], Awaitable[object]]


async def hang() -> None:
    await asyncio.Event().wait()


class ScriptedRouter(AloraServiceServicer):
    """Fails as told, then answers. ``after`` is how many events it sends before each failure.

    A status code stands for a failure of gRPC's own, without our words; ``hang`` for a router that does.
    """

    def __init__(self, *failures: AloraServeError | grpc.StatusCode | Silence, after: int = 0) -> None:
        self.failures = list(failures)
        self.after = after
        self.calls = 0
        self.requests: list[Any] = []

    async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        async def samples() -> AsyncIterator[types_pb2.GenerationEvent]:
            for index, sample in enumerate(request.interrupted_samples or [alora_pb2.InterruptedSample()] * count):
                if not sample.skip:
                    async for event in self._answers(sample):
                        event.sample_index = index
                        yield event

        count = request.sampling.n
        answers = samples() if count > 1 else self._answers(request)
        async for response in self._failing(request, answers, context):
            yield alora_pb2.GenerateResponse(event=response)

    async def FanOut(self, request: Any, context: Any) -> Any:  # noqa: N802
        async def answers() -> AsyncIterator[alora_pb2.FanOutResponse]:
            for index, target in enumerate(request.targets):
                if not target.skip:
                    async for event in self._answers(target):
                        yield alora_pb2.FanOutResponse(index=index, event=event)

        async for response in self._failing(request, answers(), context):
            yield response

    async def _answers(self, request: Any) -> AsyncIterator[types_pb2.GenerationEvent]:
        resume = read_resume(request.resume, 256, Violations(), field="resume") if request.HasField("resume") else None
        async for event in answer(GenerateRequest(handle(), resume=resume), 0):
            yield event_to_proto(event)

    async def _failing(self, request: Any, responses: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.calls += 1
        self.requests.append(request)
        sent = 0
        async for response in responses:
            if self.failures and sent == self.after:
                await self._fail(context)
            yield response
            sent += 1
        if self.failures and sent == self.after:
            await self._fail(context)

    async def ListAdapters(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.calls += 1
        if self.failures:
            await self._fail(context)
        return alora_pb2.ListAdaptersResponse()

    async def _fail(self, context: Any) -> None:
        failure = self.failures.pop(0)
        if isinstance(failure, grpc.StatusCode):
            await context.abort(failure, failure.name)
        elif isinstance(failure, AloraServeError):
            raise failure
        else:
            await failure()

    async def RunIntrinsics(self, request: Any, context: Any) -> Any:  # noqa: N802
        async def results() -> AsyncIterator[alora_pb2.RunIntrinsicsResponse]:
            for index in range(len(request.intrinsics)):
                if index not in request.done:
                    result = alora_pb2.RunIntrinsicResponse(raw_text=f"{index}")
                    yield alora_pb2.RunIntrinsicsResponse(index=index, result=result)

        async for response in self._failing(request, results(), context):
            yield response

    @asynccontextmanager
    async def served(self, address: str = "127.0.0.1:0") -> AsyncIterator[Server]:
        server = await start_server(partial(add_AloraServiceServicer_to_server, self), address)
        try:
            yield server
        finally:
            await server.kill()


async def test_calls_that_found_nobody_are_repeated(connect: Any) -> None:
    router = ScriptedRouter(UnavailableError("starting"), UnavailableError("starting"))
    async with router.served() as server, connect(server.address, retry=FAST) as client:
        assert (await run(client, lambda c: c.generate("Hi").result())).text == "Hello world!"
        assert router.calls == 3
        router.failures = [UnavailableError("starting")]
        assert await run(client, lambda c: c.list_adapters()) == []
        assert router.calls == 5


async def test_a_stream_that_begins_anew_before_its_first_token_draws_as_it_said_it_would(connect: Any) -> None:
    router = ScriptedRouter(UnavailableError("gone"), after=1)
    async with router.served() as server, connect(server.address, retry=FAST) as client:
        events = await events_of(client, lambda c: c.generate("Hi"))
        assert sum(isinstance(event, Started) for event in events) == 1
        first, second = router.requests
        assert not first.sampling.HasField("seed")
        assert second.sampling.seed == events[0].seed
        assert not second.HasField("resume")

        router.failures, router.requests = [UnavailableError("gone")], []
        await run(client, lambda c: c.fanout("Hi", ["a", "b"]).results())
        started, other = router.requests[1].targets
        assert (started.sampling.HasField("seed"), other.sampling.HasField("seed")) == (True, False)


async def test_a_stream_whose_router_falls_silent_goes_on_with_another(connect: Any) -> None:
    router = ScriptedRouter(hang, after=3)
    retry = RetryPolicy(backoff_seconds=0.01, silence_seconds=0.2)
    async with router.served() as server, connect(server.address, retry=retry) as client:
        assert (await run(client, lambda c: c.generate("Hi").result())).text == "Hello world!"
        assert [bool(request.resume.generated_token_ids) for request in router.requests] == [False, True]
        router.failures, router.after = [hang], 8
        results = await run(client, lambda c: c.fanout("Hi", ["a", "b"]).results())
        assert [result.text for result in results] == ["Hello world!"] * 2
        router.failures, router.after = [hang, hang], 3
        retry_never = replace(retry, max_attempts=1)
        async with connect(server.address, retry=retry_never) as impatient:
            with pytest.raises(UnavailableError, match="fell silent: nothing came from it for 0"):
                await run(impatient, lambda c: c.generate("Hi").result())


async def test_a_router_that_has_said_nothing_yet_or_need_not_is_waited_for(connect: Any) -> None:
    async def pause() -> None:
        await asyncio.sleep(1.0)

    router = ScriptedRouter(pause)
    retry = RetryPolicy(backoff_seconds=0.01, silence_seconds=0.2)
    async with router.served() as server, connect(server.address, retry=retry) as client:
        assert (await run(client, lambda c: c.generate("Hi").result())).text == "Hello world!"  # a prefill, perhaps
        router.failures, router.after = [pause], 1
        assert len(await run(client, lambda c: c.run_intrinsics("Hi", ["a", "b"]).results())) == 2
        assert router.calls == 2
        router.failures, router.after = [pause], 3
        async with connect(server.address, retry=replace(retry, silence_seconds=None)) as patient:
            assert (await run(patient, lambda c: c.generate("Hi").result())).text == "Hello world!"
        assert router.calls == 3


async def test_the_thread_that_watches_a_stream_ends_with_it() -> None:
    def watching() -> int:
        return sum(thread.name == "silence watch" for thread in threading.enumerate())

    router = ScriptedRouter()
    async with router.served() as server:
        with Client(server.address, retry=RetryPolicy(silence_seconds=0.2)) as client:

            def forget_one() -> None:
                next(client.generate("Hi"))  # read no further, nor closed

            await asyncio.to_thread(lambda: client.generate("Hi").result())
            await asyncio.to_thread(forget_one)
            gc.collect()
            await until(lambda: not watching())


async def test_a_call_that_nobody_cancelled_was_ended_by_a_router_that_leaves(connect: Any) -> None:
    router = ScriptedRouter(grpc.StatusCode.CANCELLED, after=2)
    async with router.served() as server, connect(server.address, retry=FAST) as client:
        assert (await run(client, lambda c: c.generate("Hi", seed=3).result())).text == "Hello world!"
        router.failures = [grpc.StatusCode.CANCELLED]
        assert await run(client, lambda c: c.list_adapters()) == []
        router.failures, router.after = [RequestCancelledError("it stopped reading")], 0
        with pytest.raises(RequestCancelledError, match="stopped reading"):
            await run(client, lambda c: c.generate("Hi").result())


@pytest.mark.parametrize(
    ("bounds", "calls"), [({"max_attempts": 3}, 3), ({"begin_seconds": 0.0}, 1), ({"max_attempts": 1}, 1)]
)
async def test_repetitions_are_bounded(connect: Any, bounds: dict[str, Any], calls: int) -> None:
    router = ScriptedRouter(*[UnavailableError("starting")] * 9)
    retry = RetryPolicy(backoff_seconds=0.01, **bounds)
    async with router.served() as server, connect(server.address, retry=retry) as client:
        with pytest.raises(UnavailableError):
            await run(client, lambda c: c.generate("Hi").result())
        assert router.calls == calls


async def test_a_call_begun_while_the_only_router_restarts_is_answered_by_the_next(connect: Any) -> None:
    first = await start_server(partial(health_pb2_grpc.add_HealthServicer_to_server, HealthServicer([])))
    await first.kill()  # nobody listens there now
    router = ScriptedRouter()
    async with connect(first.address) as client:
        asked = asyncio.create_task(run(client, lambda c: c.generate("Hi").result()))
        await asyncio.sleep(1.0)  # more than two short pauses
        assert not asked.done()
        async with router.served(first.address):
            assert (await asked).text == "Hello world!"


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
async def test_a_stream_whose_router_is_lost_goes_on_at_the_next(connect: Any, after: int) -> None:
    router = ScriptedRouter(*[UnavailableError("gone")] * 2, after=after)
    async with router.served() as server, connect(server.address, retry=FAST) as client:
        events = await events_of(client, lambda c: c.generate("Hi", seed=3))
        chunks = [event for event in events if isinstance(event, TokenChunk)]
        assert [chunk.text for chunk in chunks] == ["Hello", " world"]
        for once in (Started, Finished):
            assert sum(isinstance(event, once) for event in events) == 1
        assert isinstance(events[-1], Finished)


@pytest.mark.parametrize("failure", [UnavailableError("gone"), DeadlinePassedError("late"), AloraServeError("a bug")])
async def test_a_router_that_is_lost_once_all_has_come_is_missed_by_nobody(
    connect: Any, failure: AloraServeError
) -> None:
    calls: list[tuple[int, Callable[[Any], Any], list[str]]] = [
        (5, lambda c: c.generate("Hi").result(), ["Hello world!"]),
        (10, lambda c: c.sample("Hi", 2).results(), ["Hello world!"] * 2),
        (10, lambda c: c.fanout("Hi", ["a", "b"]).results(), ["Hello world!"] * 2),
        (2, lambda c: c.run_intrinsics("Hi", ["a", "b"]).results(), ["0", "1"]),
    ]
    for after, call, texts in calls:
        router = ScriptedRouter(failure, after=after)
        async with router.served() as server, connect(server.address, retry=FAST) as client:
            found = await run(client, call)
            results = found if isinstance(found, list) else [found]
            assert [result.raw_text if after == 2 else result.text for result in results] == texts
            assert (router.calls, router.failures) == (1, []), "it failed, and nobody asked again"


async def test_why_a_call_for_nothing_is_refused_is_told(connect: Any) -> None:
    for call in (lambda c: c.fanout("Hi", []).results(), lambda c: c.run_intrinsics("Hi", []).results()):
        router = ScriptedRouter(InvalidRequestError("none"))
        async with router.served() as server, connect(server.address, retry=FAST) as client:
            with pytest.raises(InvalidRequestError, match="none"):
                await run(client, call)


async def test_a_stream_that_is_closed_before_it_is_repeated_makes_no_further_call(connect: Any) -> None:
    router = ScriptedRouter(UnavailableError("gone"))
    retry = RetryPolicy(backoff_seconds=1.0)
    async with router.served() as server, connect(server.address, retry=retry) as client:
        stream = await run(client, lambda c: c.generate("Hi"))
        reading = asyncio.create_task(run(client, lambda _: stream.result()))
        await until(lambda: router.calls == 1)
        await asyncio.sleep(0.1)  # it has heard of that, and waits for half a second at least
        await done(stream.close())
        with pytest.raises(UnavailableError, match="before the generation was finished"):
            await reading
        await run(client, lambda c: c.generate("Hi").result())
        assert router.calls == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.generate("Hi").result(),
        lambda c: c.list_adapters(),
        lambda c: (c.on_behalf_of() if isinstance(c, AsyncClient) else c).list_adapters(),
    ],
    ids=["stream", "call", "other caller"],
)
async def test_closing_a_client_cancels_what_it_would_have_called_again(
    connect: Any, call: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()

    def draw_a_pause(*_: float) -> float:
        waiting.set()
        return 1.0

    monkeypatch.setattr("alora_serve.client.retry.random.uniform", draw_a_pause)
    router = ScriptedRouter(*[UnavailableError("gone")] * 9)
    async with router.served() as server, connect(server.address) as client:
        asked = asyncio.create_task(run(client, call))
        await until(waiting.is_set)
        await done(client.close())
        with pytest.raises(RequestCancelledError, match="closed before the call could be made again"):
            await asked


async def test_a_fan_out_whose_router_is_lost_asks_for_what_is_missing(connect: Any) -> None:
    router = ScriptedRouter(UnavailableError("gone"), after=8)
    async with router.served() as server, connect(server.address, retry=FAST) as client:
        results = await run(client, lambda c: c.fanout("Hi", ["a", "b"]).results())
        assert [result.text for result in results] == ["Hello world!"] * 2
        assert [target.skip for target in router.requests[1].targets] == [True, False]
        resume = router.requests[1].targets[1].resume
        assert (resume.generated_token_ids, resume.model_digest) == (pack_token_ids((10,)), handle().model_digest)


async def test_samples_whose_router_is_lost_are_asked_for_as_far_as_they_are_missing(connect: Any) -> None:
    router = ScriptedRouter(UnavailableError("gone"), after=8)
    async with router.served() as server, connect(server.address, retry=FAST) as client:
        results = await run(client, lambda c: c.sample("Hi", 3, temperature=1.0).results())
        assert [result.text for result in results] == ["Hello world!"] * 3
        ended, begun, awaited = router.requests[1].interrupted_samples
        assert (ended.skip, begun.skip, awaited.skip) == (True, False, False)
        assert begun.resume.generated_token_ids == pack_token_ids((10,))
        assert not awaited.HasField("resume")
        assert router.requests[1].sampling.seed == results[0].seed


async def test_samples_come_as_they_come_with_their_index(connect: Any) -> None:
    async with deployment([FakePrefill()], [FakeWorker()]) as (router, _), connect(router.address) as client:
        events = await events_of(client, lambda c: c.sample("Hi", 2))
        for index in (0, 1):
            own = [event for sample, event in events if sample == index]
            assert isinstance(own[0], Started)
            assert isinstance(own[-1], Finished)
        with pytest.raises(InvalidRequestError):
            await run(client, lambda c: c.sample("Hi", 65).results())


async def test_a_client_told_not_to_repeat_does_not_go_on(connect: Any) -> None:
    router = ScriptedRouter(UnavailableError("gone"), after=3)
    async with router.served() as server, connect(server.address, retry=RetryPolicy(max_attempts=1)) as client:
        with pytest.raises(UnavailableError):
            await run(client, lambda c: c.generate("Hi").result())
        assert router.calls == 1


async def test_overload_is_repeated_only_when_asked_for(connect: Any) -> None:
    router = ScriptedRouter(OverloadedError("full", retry_after_seconds=0.05))
    async with router.served() as server:
        async with connect(server.address, retry=FAST) as client:
            with pytest.raises(OverloadedError) as caught:
                await run(client, lambda c: c.generate("Hi").result())
            assert caught.value.retry_after_seconds == 0.05
        router.failures = [OverloadedError("full", retry_after_seconds=0.05)]
        async with connect(server.address, retry=RetryPolicy(backoff_seconds=0.01, retry_overloaded=True)) as client:
            assert (await run(client, lambda c: c.generate("Hi").result())).text == "Hello world!"


@pytest.mark.parametrize(
    ("size_bytes", "kind"), [(DEFAULT_MESSAGE_BYTES, InvalidRequestError), (MAX_MESSAGE_BYTES, MessageTooLargeError)]
)
async def test_a_request_too_large_is_sent_once(
    connect: Any, size_bytes: int, kind: type[AloraServeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_a_pause(*_: float) -> float:
        raise AssertionError("it is sent again")

    monkeypatch.setattr("alora_serve.client.retry.random.uniform", draw_a_pause)
    router = ScriptedRouter()
    async with router.served() as server, connect(server.address, retry=RetryPolicy(retry_overloaded=True)) as client:
        with pytest.raises(kind) as caught:
            await run(client, lambda c: c.generate("x" * size_bytes).result())
        assert type(caught.value) is kind
        assert await run(client, lambda c: c.list_adapters()) == []
    assert router.calls == 1


async def test_a_stream_without_its_last_message_has_no_result(connect: Any) -> None:
    class Short(ScriptedRouter):
        async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
            return
            yield

    async with Short().served() as server, connect(server.address) as client:
        with pytest.raises(UnavailableError, match="ended before"):
            await run(client, lambda c: c.generate("Hi").result())


async def test_waiting_for_readiness_ends_when_the_router_serves(connect: Any) -> None:
    health = HealthServicer([], serving=False)
    server = await start_server(partial(health_pb2_grpc.add_HealthServicer_to_server, health))
    async with connect(server.address) as client:
        waiting = asyncio.create_task(run(client, lambda c: c.wait_ready(20)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        health.set_serving(True)
        await waiting
    await server.kill()


async def test_waiting_for_readiness_survives_a_router_that_restarts(connect: Any) -> None:
    health = HealthServicer([], serving=False)
    server = await start_server(partial(health_pb2_grpc.add_HealthServicer_to_server, health))
    async with connect(server.address) as client:
        waiting = asyncio.create_task(run(client, lambda c: c.wait_ready(20)))
        await asyncio.sleep(0.05)
        await server.kill()
        again = await start_server(
            partial(health_pb2_grpc.add_HealthServicer_to_server, HealthServicer([])), server.address
        )
        await waiting
    await again.kill()


async def test_waiting_for_readiness_gives_up_in_time(connect: Any) -> None:
    health = HealthServicer([], serving=False)
    server = await start_server(partial(health_pb2_grpc.add_HealthServicer_to_server, health))
    async with connect(server.address) as client:
        with pytest.raises(UnavailableError, match=r"is not ready after 0\.2 s"):
            await run(client, lambda c: c.wait_ready(0.2))
    await server.kill()


async def test_a_router_that_is_not_there_is_unavailable(connect: Any) -> None:
    async with connect("127.0.0.1:1", retry=RetryPolicy(max_attempts=2)) as client:
        with pytest.raises(UnavailableError):
            await run(client, lambda c: c.get_model())


async def test_a_proxy_in_the_environment_does_not_see_calls_to_this_machine(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    router = ScriptedRouter()
    async with router.served() as server:
        for variable in ("http_proxy", "grpc_proxy", "https_proxy"):
            monkeypatch.setenv(variable, "http://127.0.0.1:1")  # nobody listens there
        async with connect(server.address, retry=RetryPolicy(max_attempts=1)) as client:
            assert await run(client, lambda c: c.list_adapters()) == []
    assert router.calls == 1


async def test_clients_take_credentials() -> None:
    secured = {"credentials": grpc.ssl_channel_credentials(), "retry": RetryPolicy(max_attempts=1)}
    with Client("127.0.0.1:1", **secured) as client, pytest.raises(UnavailableError):
        await asyncio.to_thread(client.get_model)
    async with AsyncClient("127.0.0.1:1", **secured) as other:
        with pytest.raises(UnavailableError):
            await other.get_model()


async def test_a_run_of_intrinsics_goes_on_from_the_results_that_came(connect: Any) -> None:
    router = ScriptedRouter(UnavailableError("gone"), UnavailableError("gone"), after=1)
    async with router.served() as server, connect(server.address, retry=FAST) as client:
        results = await run(client, lambda c: c.run_intrinsics("Hi", ["a", "b", "c"]).results())
        assert [result.raw_text for result in results] == ["0", "1", "2"]
        assert [list(request.done) for request in router.requests] == [[], [0], [0, 1]]


async def test_results_that_failed_are_errors_and_one_call_gives_one_result(connect: Any) -> None:
    workers = [FakeWorker()]
    workers[0].define("certainty", "model: ~\nresponse_format: ~\ntransformations: ~\n")
    async with deployment([FakePrefill()], workers) as (router, _), connect(router.address) as client:
        outcomes = await run(client, lambda c: c.run_intrinsics("Hi", ["jailbreak", "certainty"]).results())
        assert [type(outcome) for outcome in outcomes] == [IntrinsicUndefinedError, IntrinsicOutputError]
        seen = await events_of(client, lambda c: c.run_intrinsics("Hi", ["jailbreak"]))
        assert [(index, type(outcome)) for index, outcome in seen] == [(0, IntrinsicUndefinedError)]
        with pytest.raises(IntrinsicOutputError, match="not JSON"):
            await run(client, lambda c: c.run_intrinsic("Hi", "certainty"))


async def test_one_connection_speaks_for_several_callers() -> None:
    worker = FakeWorker()
    async with deployment([FakePrefill()], [worker]) as (router, _), AsyncClient(router.address) as client:
        await client.on_behalf_of(request_id="r-7").generate("Hi").result()
        await client.generate("Hi").result()
    named, unnamed = (request.request_id for request in worker.requests[-2:])
    assert named == "r-7"
    assert unnamed != "r-7"

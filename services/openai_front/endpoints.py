"""The endpoints: each turns a body into a question, asks the router, and writes the answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from alora_serve.client import (
    AdapterInfo,
    AsyncClient,
    AsyncIntrinsicsStream,
    Heartbeat,
    ModelInfo,
    Prompt,
    StreamEvent,
)
from alora_serve.errors import AdapterNotFoundError, AloraServeError, InvalidRequestError, UnavailableError
from alora_serve.intrinsics import with_documents_placed
from alora_serve.intrinsics.excerpts import excerpt
from openai_front import failures
from openai_front.answers import AnswerWriter, Head
from openai_front.caller import Caller
from openai_front.chat_answers import ChatWriter
from openai_front.chat_request import ChatRequest
from openai_front.completion_answers import CompletionWriter
from openai_front.completion_request import CompletionRequest
from openai_front.event_stream import DONE, SIGN_OF_LIFE, EventStream, event, unless_left
from openai_front.generations import Answer, Question, run
from openai_front.intrinsics import IntrinsicsRequest, Outcome, outcome_events
from openai_front.router import Router

HEALTH_SECONDS: Final = 2.0
"""How long ``/health`` waits for a router that is about to serve."""
_STARTED: Final = int(time.time())


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What all endpoints need.

    Attributes:
        router: whom they ask.
        write_timeout_seconds: how long an event waits for a client that stopped reading.
        default_max_tokens: longest answer to a request that does not say.
    """

    router: Router
    write_timeout_seconds: float
    default_max_tokens: int

    def routes(self) -> APIRouter:
        """The routes of OpenAI's API, and of health."""
        routes = APIRouter()
        for method, path, endpoint in (
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.complete),
            ("POST", "/v1/intrinsics", self.judge),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("GET", "/health", self.health),
        ):
            routes.add_api_route(path, endpoint, methods=[method], response_model=None)
        routes.add_api_route("/health", self.health, methods=["HEAD"], response_model=None, include_in_schema=False)
        return routes

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        client = self._client(request)
        base = await self.router.model(client)
        adapter = _adapter(body.model, base.name, body.adapter_names)
        prompt = with_documents_placed(body.prompt(), template_takes_documents=base.takes_documents)
        question = self._question(body, [prompt], adapter)
        return await self._answer(request, body, client, question, ChatWriter(_head(body.model, base), body, question))

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continue texts or tokens."""
        client = self._client(request)
        base = await self.router.model(client)
        adapter = _adapter(body.model, base.name, body.adapter_names)
        question = self._question(body, body.prompts(), adapter)
        writer = CompletionWriter(_head(body.model, base), body, question)
        return await self._answer(request, body, client, question, writer)

    async def judge(self, body: IntrinsicsRequest, request: Request) -> Response:
        """Run intrinsics on a conversation."""
        prompt, parameters = body.prompt(), body.parameters
        running = self._client(request).run_intrinsics(None, body.intrinsics, prompt=prompt, parameters=parameters)
        if not body.stream:
            async with running:
                outcomes = await unless_left(request, body.as_asked(running.results()))
            data = [body.outcome(index, outcome) for index, outcome in enumerate(outcomes)]
            return JSONResponse({"object": "list", "data": data})
        try:
            first = await unless_left(request, body.as_asked(_next(running)))
        except BaseException:
            await running.close()
            raise
        events = outcome_events(body, first, running)
        return EventStream(events, write_timeout_seconds=self.write_timeout_seconds)

    async def models(self, request: Request) -> Response:
        """The base model, and every adapter that can be served."""
        return JSONResponse({"object": "list", "data": list((await self._models(request)).values())})

    async def model(self, name: str, request: Request) -> Response:
        """One of them."""
        known = await self._models(request)
        if name not in known:
            raise AdapterNotFoundError(f"no model {excerpt(name)} here; there are {', '.join(sorted(known))}")
        return JSONResponse(known[name])

    async def health(self) -> Response:
        """Whether a request would be answered."""
        try:
            await self.router.wait_ready(HEALTH_SECONDS)
        except UnavailableError as error:
            return JSONResponse({"status": "unavailable", "reason": str(error)}, 503)
        return JSONResponse({"status": "ok"})

    def _client(self, request: Request) -> AsyncClient:
        caller = Caller.of(request)
        return self.router.as_caller(caller.api_key, caller.request_id)

    def _question(self, body: ChatRequest | CompletionRequest, prompts: Sequence[Prompt], adapter: str) -> Question:
        sampling = replace(body.sampling_params(), default_max_tokens=self.default_max_tokens)
        return Question(prompts, adapter, sampling, body.num_samples, body.field_names)

    async def _models(self, request: Request) -> dict[str, Mapping[str, Any]]:
        client = self._client(request)
        base, adapters = await asyncio.gather(client.get_model(), client.list_adapters())
        served = [adapter for adapter in adapters if not adapter.problem and adapter.name != base.name]
        return {base.name: _base(base)} | {adapter.name: _listed(adapter, base) for adapter in served}

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        client: AsyncClient,
        question: Question,
        writer: AnswerWriter,
    ) -> Response:
        answers = [Answer() for _ in range(question.num_choices)]
        wants_usage, events = body.wants_usage, run(client, question)
        if not body.wants_stream:
            await unless_left(request, _read_all(events, answers))
            return JSONResponse(writer.whole(answers))
        # What fails before the first event fails as any request does, with a status of its own.
        first = await unless_left(request, _first(events))
        stream = _stream(first, events, answers, writer, wants_usage=wants_usage)
        return EventStream(stream, write_timeout_seconds=self.write_timeout_seconds)


def _adapter(model: str, base: str, fields: Mapping[str, str | None]) -> str:
    """The adapter that a request names, in whichever way; empty is the base model.

    Raises:
        InvalidRequestError: it names two.
    """
    given = {"model": "" if model == base else model, **fields}
    chosen, chosen_by = "", ""
    for field, name in given.items():
        if name and chosen and name != chosen:
            named, other = excerpt(name), excerpt(chosen)
            raise InvalidRequestError.of(field, f"names the adapter {named}, and {chosen_by} names {other}")
        if name:
            chosen, chosen_by = name, field
    return chosen


def _head(model: str, base: ModelInfo) -> Head:
    return Head(uuid.uuid4().hex[:24], int(time.time()), model, base)


def _base(base: ModelInfo) -> Mapping[str, Any]:
    return {
        "id": base.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "alora-serve",
        "parent": None,
        "max_model_len": base.context_tokens,
    }


def _listed(adapter: AdapterInfo, base: ModelInfo) -> Mapping[str, Any]:
    return {
        **_base(base),
        "id": adapter.name,
        "parent": base.name,
        "adapter": {
            "kind": adapter.kind,
            "rank": adapter.rank,
            "digest": adapter.digest,
            "intrinsic": bool(adapter.intrinsic_digest),
            # Who may not know it is told that it is not.
            **({"resident": True} if adapter.resident else {}),
        },
    }


async def _next(running: AsyncIntrinsicsStream) -> tuple[int, Outcome]:
    return await anext(running)


async def _read_all(events: AsyncGenerator[tuple[int, StreamEvent]], answers: list[Answer]) -> None:
    async with aclosing(events):
        async for index, what in events:
            answers[index].add(what)


async def _first(events: AsyncGenerator[tuple[int, StreamEvent]]) -> tuple[int, StreamEvent]:
    """What comes first but for signs of life: what is refused after a slow start has a status of its own, too."""
    try:
        while True:
            index, what = await anext(events)
            if not isinstance(what, Heartbeat):
                return index, what
    except BaseException:
        await events.aclose()
        raise


async def _stream(
    first: tuple[int, StreamEvent],
    events: AsyncGenerator[tuple[int, StreamEvent]],
    answers: list[Answer],
    writer: AnswerWriter,
    *,
    wants_usage: bool,
) -> AsyncGenerator[bytes]:
    def written(index: int, what: StreamEvent) -> bytes:
        text = answers[index].add(what)
        return b"".join(map(event, writer.chunks(index, answers[index], what, text))) or SIGN_OF_LIFE

    async with aclosing(events):
        yield written(*first)
        try:
            async for index, what in events:
                yield written(index, what)
        except AloraServeError as error:
            # The status has been sent: what is left is to say so as OpenAI does, and not to say that it is done.
            yield event(failures.failure_of(error).body)
            return
    if wants_usage:
        yield event(writer.last_chunk(answers))
    yield DONE

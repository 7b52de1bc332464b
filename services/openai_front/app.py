"""The ASGI application: routes, errors, and what surrounds each request."""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from alora_serve.errors import AloraServeError
from alora_serve.metrics import HttpMetrics
from alora_serve.rpc.in_flight import InFlightCalls
from openai_front.endpoints import Endpoints
from openai_front.failures import validation_error
from openai_front.middleware import RequestMiddleware, answer_unrouted, answer_with
from openai_front.page import page_routes

_TITLE: Final = "alora-serve"


def build_app(
    endpoints: Endpoints,
    registry: CollectorRegistry,
    in_flight: InFlightCalls,
    *,
    with_page: bool,
    read_timeout_seconds: float,
) -> FastAPI:
    """Put it together.

    Args:
        endpoints: OpenAI's API.
        registry: what ``/metrics`` shows.
        in_flight: counts requests, admits as many as may run, and none after a drain began.
        with_page: serve ``/ui``.
        read_timeout_seconds: longest wait for a body to arrive whole.
    """
    # FastAPI's own pages of documentation load scripts from other hosts.
    app = FastAPI(title=_TITLE, docs_url=None, redoc_url=None)
    app.include_router(endpoints.routes())
    if with_page:
        app.include_router(page_routes())

    @app.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(AloraServeError)
    async def refused(_: Request, error: AloraServeError) -> Response:
        return answer_with(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return answer_with(validation_error(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def unrouted(_: Request, error: HTTPException) -> Response:
        return answer_unrouted(error)

    app.add_middleware(
        RequestMiddleware,
        in_flight=in_flight,
        metrics=HttpMetrics(registry),
        read_timeout_seconds=read_timeout_seconds,
    )
    return app

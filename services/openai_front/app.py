"""The ASGI application: routes, errors, and what surrounds each request."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from alora_serve.errors import AloraServeError
from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.metrics import HttpMetrics
from alora_serve.rpc.in_flight import InFlightCalls
from openai_front.endpoints import Endpoints
from openai_front.failures import validation_error
from openai_front.middleware import RequestMiddleware, answer_unrouted, answer_with
from openai_front.page import page_routes

_TITLE: Final = "alora-serve"
_PATH_CHARACTERS: Final = 100
_NO_SUCH_PATH: Final = 404
_NOT_JSON: Final = 415


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
    app = FastAPI(title=_TITLE, docs_url=None, redoc_url=None, redirect_slashes=False)
    api = endpoints.routes()
    app.include_router(api)
    served = api.routes
    if with_page:
        page = page_routes()
        app.include_router(page)
        served = [*served, *page.routes]
    paths = [route.path.replace(":path}", "}") for route in served if isinstance(route, APIRoute)]

    @app.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(AloraServeError)
    async def refused(_: Request, error: AloraServeError) -> Response:
        return answer_with(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if isinstance(error.body, bytes):  # it was not parsed
            return answer_unrouted(HTTPException(_NOT_JSON, "send the body as `Content-Type: application/json`"))
        return answer_with(validation_error(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        if error.status_code == _NO_SUCH_PATH:
            return answer_unrouted(HTTPException(error.status_code, _nearest(request.url.path, paths)))
        return answer_unrouted(error)

    app.add_middleware(
        RequestMiddleware,
        router=endpoints.router,
        in_flight=in_flight,
        metrics=HttpMetrics(registry),
        read_timeout_seconds=read_timeout_seconds,
    )
    return app


def _nearest(path: str, served: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(path[:_PATH_CHARACTERS], dict.fromkeys(served), cutoff=0.0)
    return f"there is no {excerpt(path)} here; the nearest paths are {', '.join(nearest)}"

"""What surrounds each HTTP request, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from front_door import open_door
from openai_front.middleware import Bounded
from recorded_spans import recording

INVENTED = 300
LIMIT_BYTES = 1000


async def test_methods_and_paths_that_clients_invent_make_neither_series_nor_names_of_spans() -> None:
    with recording() as recorded:
        async with open_door("127.0.0.1:1") as door:
            await asyncio.gather(
                *(door.http.request(f"BREW{number}", "/v1/models") for number in range(INVENTED)),
                *(door.http.get(f"/nothing-{number}") for number in range(INVENTED)),
            )
            page = (await door.http.get("/metrics")).text
        names = {span.name for span in recorded.named("")}
    assert f'alora_http_requests_total{{route="other /v1/models",status="405"}} {INVENTED}.0' in page
    assert f'alora_http_requests_total{{route="GET other",status="404"}} {INVENTED}.0' in page
    assert "BREW" not in page
    assert "nothing" not in page
    assert names == {"other /v1/models", "GET other", "GET /metrics"}


class Part(dict[str, Any]):
    """A part of a body that can be watched."""


@pytest.mark.parametrize(("size_bytes", "status"), [(1, 408), (LIMIT_BYTES + 1, 413)], ids=["slow", "long"])
async def test_nothing_of_a_body_that_was_refused_is_kept(size_bytes: int, status: int) -> None:
    parts = [Part(type="http.request", body=bytes(size_bytes), more_body=True)]
    watched = weakref.ref(parts[0])

    async def receive() -> Any:
        if not parts:
            await asyncio.Event().wait()
        return parts.pop()

    async def read() -> None:
        bounded, kept = Bounded(receive, LIMIT_BYTES, 0.01), []
        while True:
            kept.append(await bounded())

    with pytest.raises(HTTPException) as caught:
        await read()
    assert caught.value.status_code == status
    del caught
    gc.collect()
    assert watched() is None

"""What surrounds each HTTP request, over real sockets."""

from __future__ import annotations

import asyncio

from front_door import open_door
from recorded_spans import recording

INVENTED = 300


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

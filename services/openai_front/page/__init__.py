"""The page ``/ui``: one committed file, without a build step and without other hosts."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_routes() -> APIRouter:
    """The one route."""
    text = files(__name__).joinpath("index.html").read_text("utf-8")
    headers = {
        "content-security-policy": content_policy(text),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    routes = APIRouter()

    @routes.get("/ui", include_in_schema=False)
    def page() -> Response:
        """The page."""
        return HTMLResponse(text, headers=headers)

    return routes


def content_policy(text: str) -> str:
    """Nothing runs but what the file itself holds, and nothing is asked but this server."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

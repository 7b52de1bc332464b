"""As much of the Hugging Face hub as a download asks for, on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]

NOTES = {".cache", ".hub-copy.json"}
"""What the hub's client, and ours, keep beside what they fetched."""


@dataclass
class FakeHub:
    """One that knows a single repository, by whatever name.

    Attributes:
        revisions: its files by branch; a test changes them.
        endpoint: where it is.
        asked_with: values of ``Authorization``.
        sent: names of the files that were fetched.
        withheld: names of files that are listed and not given.
    """

    revisions: dict[str, Files]
    endpoint: str = ""
    asked_with: set[str | None] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)
    withheld: set[str] = field(default_factory=set)

    def environment(self, home: Path) -> dict[str, str]:
        """This process's, for one that fetches from here."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return own | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """The commit that is asked about, and what is said."""
        for branch, held in self.revisions.items():
            commit = hashlib.sha1(repr(sorted(held.items())).encode()).hexdigest()
            if path.endswith((f"/revision/{branch}", f"/revision/{commit}")):
                return commit, json.dumps({"id": "a/b", "sha": commit, "siblings": []}).encode()
            if path.endswith(f"/tree/{commit}"):
                return commit, json.dumps([_entry(name, text) for name, text in held.items()]).encode()
            name = path.rpartition(f"/resolve/{commit}/")[2]
            if name in held:
                return commit, held[name]
        return None


def fetched(root: Path) -> dict[str, bytes]:
    """What lies in a folder, by its path there, but for notes."""
    files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {str(name): text for name, text in files.items() if not NOTES & set(name.parts)}


@contextmanager
def fake_hub(**revisions: Files) -> Iterator[FakeHub]:
    """One with these branches."""
    hub = FakeHub(dict(revisions))

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            answered = hub.answer(path)
            if answered is None:
                self.send_error(404)
                return
            commit, body = answered
            if self.command == "GET" and path.rpartition("/")[2] in hub.withheld:
                self.send_error(403)
                return
            hub.asked_with.add(self.headers.get("Authorization"))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                hub.sent += [path.rpartition("/")[2]] if "/resolve/" in path else []
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def _entry(name: str, text: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(text), "oid": hashlib.sha1(text).hexdigest()}

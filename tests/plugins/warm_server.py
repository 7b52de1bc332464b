"""Imports all that services import, once, and becomes one of them by a fork each time it is asked.

Started by :mod:`warm_starts`, which says what may be asked::

    python -P warm_server.py CONTROL_FD SERVICE...

CONTROL_FD is one end of a socket pair of packets. ``warm`` is written to it when all is imported; each packet read is a
start, with the child's standard streams and a pipe for news of it: a line with its process id, and one with its exit
status. The end of the socket is this process's end, and the kernel ends all of its children with it.

A fork copies the calling thread alone, and whatever locks others hold: so nothing here may have started a thread, which
torch's operations on several threads and gRPC's channels and servers do, and imports do not. That is checked. Coverage
of the children is measured by its patch ``fork`` (pyproject.toml).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from alora_serve.cli.local import tether

MAX_REQUEST_BYTES = 1 << 20
IMPORTED_LATE = {"adapter_decode": ("transformers.models.llama.modeling_llama",)}
"""What is imported only once a model is loaded, by a service that loads one."""


@dataclass(frozen=True, slots=True)
class Start:
    """A service that is asked for.

    Attributes:
        module: what ``python -m`` would be given.
        arguments: those after it.
        environment: the whole one.
        streams: files that become standard input, output and error.
    """

    module: str
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    streams: list[int]

    def become(self, parent: int) -> None:
        """Turn this process, a fresh fork of ``parent``, into the service, and return when that has ended.

        All that ends an interpreter then happens as it does in any other: the caller has nothing more to do.
        """
        for number, stream in enumerate(self.streams):
            os.dup2(stream, number)
            os.close(stream)
        os.setsid()
        tether._ask_kernel(parent)
        os.chdir(self.directory)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.argv[1:] = self.arguments
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


class Forks:
    """What has been forked here and not ended yet."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._ready = selectors.PollSelector()  # the one kind that is no file, which children would have to close
        self._ready.register(control, selectors.EVENT_READ)

    def serve(self) -> Start:
        """Fork whenever asked. Returns in each child, with what it is to become, and exits in the parent at the end."""
        while True:
            for key, _ in self._ready.select():
                if key.fileobj is not self._control:
                    self._bury(int(key.fd), *key.data)
                elif (asked := self._fork()) is not None:
                    return asked

    def _fork(self) -> Start | None:
        packet, files, _, _ = socket.recv_fds(self._control, MAX_REQUEST_BYTES, 4)
        if not packet:
            sys.exit(0)
        *streams, news = files
        asked = Start(**json.loads(packet), streams=streams)
        _refuse_threads()
        pid = os.fork()
        if not pid:
            self._forget(news)
            return asked
        for stream in streams:
            os.close(stream)
        os.write(news, b"%d\n" % pid)
        self._ready.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, news))
        return None

    def _bury(self, handle: int, pid: int, news: int) -> None:
        """Say how a child ended."""
        self._ready.unregister(handle)
        os.close(handle)
        _, status = os.waitpid(pid, 0)
        try:
            os.write(news, b"%d\n" % os.waitstatus_to_exitcode(status))
        except BrokenPipeError:
            pass  # nobody waits any more
        finally:
            os.close(news)

    def _forget(self, news: int) -> None:
        """In a child: close what is the parent's."""
        os.close(news)
        for key in self._ready.get_map().values():
            if key.fileobj is not self._control:
                _, news_of_another = key.data
                os.close(news_of_another)
                os.close(key.fd)
        self._control.close()


def _import_all(services: list[str]) -> None:
    for service in services:
        importlib.import_module(f"{service}.__main__")
        del sys.modules[f"{service}.__main__"]  # it is run again, as the main module, which must not find itself there
        for module in IMPORTED_LATE.get(service, ()):
            importlib.import_module(module)


def _refuse_threads() -> None:
    threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if len(threads) != 1:
        raise RuntimeError(f"{len(threads)} threads where there may be one: {threads}")


def serve(control: socket.socket, services: list[str]) -> Start:
    """See the top of this file."""
    _import_all(services)
    _refuse_threads()
    gc.collect()
    gc.freeze()  # what is collected once need not be looked through, and so copied, by each child
    control.send(b"warm")
    return Forks(control).serve()


def main() -> None:
    """The program."""
    parent = os.getpid()
    control, *services = sys.argv[1:]
    serve(socket.socket(fileno=int(control)), services).become(parent)


if __name__ == "__main__":
    main()

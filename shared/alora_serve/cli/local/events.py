"""What happens to supervised processes, as told to whoever shows it, and the error of one that did not start."""

from __future__ import annotations

from dataclasses import dataclass

from alora_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process was started. It does not listen yet."""

    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Listening:
    """A process takes calls. Addresses are ``host:port``."""

    name: str
    pid: int
    address: str
    metrics_address: str


@dataclass(frozen=True, slots=True)
class LogLine:
    """A process wrote a line, without its end, to standard output or standard error."""

    name: str
    line: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A process ended.

    Attributes:
        status: exit status; negative is the number of the signal that killed it.
        expected: it was told to.
        restart_in_seconds: when it is started again; None when it is not.
    """

    name: str
    pid: int
    status: int
    expected: bool
    restart_in_seconds: float | None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know about the deployment itself."""

    message: str


class StartError(ConfigError):
    """A process ended before it listened. ``summary`` is the message without the last lines that the process wrote."""

    def __init__(self, summary: str, wrote: str) -> None:
        super().__init__(f"{summary}:\n{wrote}")
        self.summary = summary


ProcessEvent = Spawned | Listening | LogLine | Exited | Notice

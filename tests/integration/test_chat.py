"""`alora-serve chat` as a process against real services: in a pipe, for machines, and on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deployment import PATIENCE_SECONDS, Deployed, another_router

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG = 1800
"""Tokens of an answer that a test stops: the tiny model never ends its turn."""


def _command(address: str, *arguments: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """What to run, and its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALORA_")}
    environment |= {"ALORA_ADDRESS": address, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    return (sys.executable, "-m", "alora_serve.cli.app", "chat", *arguments), environment


async def chat_in_a_pipe(address: str, lines: Sequence[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a chat that was sent these lines."""
    arguments, environment = _command(address, *arguments)
    process = await asyncio.create_subprocess_exec(
        *arguments,
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate("".join(f"{line}\n" for line in lines).encode())
    return process.returncode or 0, out.decode(), err.decode()


class Machine:
    """A chat with ``--json`` that is spoken to line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def until(self, event: str) -> list[dict[str, Any]]:
        """What happens until that, with it."""
        happened: list[dict[str, Any]] = []
        assert self.process.stdout is not None
        while not happened or happened[-1]["event"] != event:
            line = await asyncio.wait_for(self.process.stdout.readline(), PATIENCE_SECONDS)
            assert line, f"it ended before {event}: {happened[-5:]}"
            happened.append(json.loads(line))
        return happened

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    async def say(self, line: str) -> dict[str, dict[str, Any]]:
        """Everything that a line leads to, by kind; the last of each."""
        self.send(line)
        return {happened["event"]: happened for happened in await self.until("waiting")}


@asynccontextmanager
async def machine(address: str, *arguments: str) -> AsyncIterator[Machine]:
    arguments, environment = _command(address, "--json", *arguments)
    process = await asyncio.create_subprocess_exec(
        *arguments,
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 22,  # the longest line that it may print
        # Tests may run in the background of a shell, where SIGINT is ignored and children would inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        chat = Machine(process)
        await chat.until("waiting")
        yield chat
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_nothing_that_was_said_is_computed_again(tiny: Deployed, tmp_path: Path) -> None:
    model, file = tiny.model, tmp_path / "saved.json"
    async with machine(tiny.local.router_address, "--max-tokens", "6", "--system", "Be short.") as chat:
        first = (await chat.say(json.dumps("What is a tide?\nAnswer.")))["answer"]
        known = first["usage"]["prompt_tokens"] + first["usage"]["generated_tokens"] - 1
        asked = (await chat.say(f"/adapter {model.appended}"))["answer"]
        assert asked["usage"]["cached_tokens"] >= known
        assert asked["usage"]["invocation_start"] is not None
        second = (await chat.say("And a wave?"))["answer"]
        assert second["usage"]["cached_tokens"] >= known, "the adapter's answer stood outside"
        assert "answer" in await chat.say(f"/adapter {model.appended}")
        assert "note" in await chat.say("/keep")
        assert [cost["adapter"] for cost in (await chat.say("/usage"))["usage"]["costs"]] == ["", model.appended]
        third = (await chat.say("And a current?"))["answer"]
        grown = third["usage"]["prompt_tokens"] - second["usage"]["prompt_tokens"]
        assert third["usage"]["computed_tokens"] <= grown
        assert "note" in await chat.say(f"/save {file}")
        listed = (await chat.say("/adapters"))["adapters"]["adapters"]
        assert [adapter["name"] for adapter in listed] == ["answer", "guard", "plain"]
        assert "note" in await chat.say("/undo")
    saved = json.loads(file.read_text())["messages"]
    roles = ["system", "user", "assistant", "user", "assistant", "assistant", "user", "assistant"]
    assert [message["role"] for message in saved] == roles
    assert saved[1]["content"] == "What is a tide?\nAnswer."


async def test_intrinsics_answer_after_every_turn_and_one_that_fails_disturbs_no_other(tiny: Deployed) -> None:
    model = tiny.model
    lines = ["What is a tide?", f"/intrinsics {model.plain}", "And a wave?"]
    names = (model.appended, model.answering)
    status, out, err = await chat_in_a_pipe(
        tiny.local.router_address, lines, "--max-tokens", "4", *(f"--intrinsic={name}" for name in names)
    )
    assert status == 0, err
    found = [line.split(":")[0] for line in out.splitlines() if line.split(":")[0] in (*names, model.plain)]
    assert sorted(found[:2]) == sorted(names)
    assert found[2:] == [model.plain]
    status, _, err = await chat_in_a_pipe(tiny.local.router_address, [], "--intrinsic", "gaurd")
    assert status == 1
    assert "no adapter named 'gaurd', did you mean guard?" in err


async def test_in_a_pipe_what_failed_shows_in_the_exit_status_and_the_rest_is_done(
    tiny: Deployed, tmp_path: Path
) -> None:
    missing, unwritable = tmp_path / "missing.json", tmp_path / "no" / "saved.json"
    lines = [
        "/adaptor x",
        f"/load {missing}",
        "What is a tide?",
        "/adapter gaurd",
        f"/save {unwritable}",
        "And a wave?",
    ]
    status, out, err = await chat_in_a_pipe(tiny.local.router_address, lines, "--max-tokens", "3")
    assert status == 1
    assert err.count("cut off after 3 tokens") == 2
    for problem in (
        "no command /adaptor",
        f"cannot read {missing}",
        "no adapter named 'gaurd'",
        f"cannot write {unwritable}",
    ):
        assert problem in err
    assert "Traceback" not in out + err


async def test_a_conversation_from_a_file_is_gone_on_with(tiny: Deployed, tmp_path: Path) -> None:
    file = tmp_path / "tides.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "What is a tide?"}]}))
    address, lines = tiny.local.router_address, ["/retry", f"/load {file}"]
    status, _, err = await chat_in_a_pipe(address, lines, "--max-tokens", "2", "--file", str(file))
    assert status == 0
    assert "(1 turn; the last one has no answer yet: /retry has it answered)" in err
    status, _, err = await chat_in_a_pipe(address, [], "--file", "-")
    assert status == 1
    assert "standard input has the lines of the chat" in err


async def test_ctrl_c_stops_an_answer_frees_its_place_and_keeps_what_had_come(tiny: Deployed) -> None:
    async with machine(tiny.local.router_address, "--max-tokens", str(LONG)) as chat:
        chat.send("What is a tide?")
        await chat.until("text")
        chat.process.send_signal(signal.SIGINT)
        happened = await chat.until("waiting")
        (stopped,) = [event for event in happened if event["event"] == "broken_off"]
        assert stopped["text"]
        assert not [event for event in happened if event["event"] == "answer"]
        await tiny.wait_for_load(running=0)
        chat.send("/intrinsics")
        await chat.until("waiting")
        chat.process.send_signal(signal.SIGINT)
        assert (await chat.until("waiting"))[0]["text"] == "Ctrl-C again or /quit leaves"
        chat.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(chat.process.wait(), PATIENCE_SECONDS) == 0


async def test_a_conversation_whose_handle_is_refused_is_sent_again_in_full(tiny: Deployed) -> None:
    """As after an update that changed the secrets: this router takes no handle that the workers sign."""
    processes = tiny.local.processes
    ends = [processes["prefill"].address], [processes["worker-1"].address]
    async with (
        another_router(*ends, handle_secrets="a secret that nobody else has") as router,
        machine(router.address, "--max-tokens", "3", "--timeout", str(PATIENCE_SECONDS)) as chat,
    ):
        await chat.say("What is a tide?")
        again = await chat.say("And a wave?")
        assert "sent again" in again["note"]["text"]
        assert again["answer"]["usage"]["generated_tokens"] == 3


async def test_on_a_terminal_lines_are_edited_and_ctrl_c_twice_leaves(tiny: Deployed, tmp_path: Path) -> None:
    keyboard, screen = pty.openpty()
    arguments, environment = _command(tiny.local.router_address, "--max-tokens", "3", "--intrinsic", "guard")
    environment |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path)}
    process = await asyncio.create_subprocess_exec(
        *arguments, env=environment, stdin=screen, stdout=screen, stderr=screen, start_new_session=True
    )
    os.close(screen)
    shown = ""

    async def until(text: str) -> None:
        nonlocal shown
        async with asyncio.timeout(PATIENCE_SECONDS):
            while text not in shown:
                with suppress(OSError):  # all who could write have closed it
                    shown += (await asyncio.to_thread(os.read, keyboard, 65536)).decode(errors="replace")
        shown = shown.partition(text)[2]

    try:
        await until("/help shows what can be done")
        await until("> ")
        os.write(keyboard, b"What is a tidy\x7fe?\r")
        await until("cut off after 3 tokens")
        await until("guard: ")
        await until("> ")
        os.write(keyboard, b"\x03")
        await until("Ctrl-C again or /quit leaves")
        await until("> ")
        os.write(keyboard, b"\x03")
        assert await asyncio.wait_for(process.wait(), PATIENCE_SECONDS) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(keyboard)
    assert "What is a tide?" in (tmp_path / "alora-serve" / "chat_history").read_text()

"""Begins a chat: connects, looks at what is served, and hands over to the loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from alora_serve.cli.chat.calls import Calls
from alora_serve.cli.chat.conversation import Conversation
from alora_serve.cli.chat.keyboard import Keyboard, LineReader, Terminal, history_file
from alora_serve.cli.chat.run import Shell
from alora_serve.cli.chat.state import Chat, unknown
from alora_serve.cli.chat.view import JsonView, PeopleView, View
from alora_serve.cli.connection import connected
from alora_serve.cli.output import console
from alora_serve.client import SamplingParams
from alora_serve.errors import InvalidRequestError


def run_chat(
    address: str,
    conversation: Conversation,
    intrinsics: Sequence[str],
    *,
    sampling: SamplingParams,
    timeout_seconds: float,
    as_json: bool,
    remember: bool,
) -> bool:
    """Chat on standard input and output until the user leaves.

    Args:
        address: of the router.
        conversation: to begin with.
        intrinsics: to ask after every turn.
        sampling: of the base model.
        timeout_seconds: of each call.
        as_json: print objects, for machines.
        remember: lines typed on a terminal are kept for the next chat.

    Returns:
        Whether all that was asked for could be done. A person at a terminal has seen what could not.

    Raises:
        InvalidRequestError: an intrinsic that does not exist.
        AloraServeError: the router cannot be asked.
    """
    with connected(address) as client:
        calls = Calls(client, sampling, timeout_seconds)
        listed = calls.adapters()
        chat = Chat(conversation=conversation, intrinsics=tuple(intrinsics)).knowing(listed)
        if problem := unknown(intrinsics, chat.adapters):
            raise InvalidRequestError.of("intrinsics", problem)
        view: View = JsonView() if as_json else PeopleView(console(), console(stderr=True))
        view.ready(calls.model(), listed)
        shell = Shell(chat, calls, view)
        interactive = not as_json and sys.stdin.isatty() and sys.stdout.isatty()
        keyboard: Keyboard
        if interactive:
            keyboard = Terminal(lambda: shell.chat.adapters, history_file() if remember else None)
        else:
            keyboard = LineReader(sys.stdin, as_json=as_json)
        shell.run(keyboard)
        return interactive or not shell.had_errors

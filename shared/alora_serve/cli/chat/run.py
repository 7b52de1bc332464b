"""The loop of a chat: reads lines, asks the core what to do, does it."""

from __future__ import annotations

import json
from collections import deque

from alora_serve.cli.chat import events
from alora_serve.cli.chat.calls import Calls, text_of
from alora_serve.cli.chat.conversation import Conversation
from alora_serve.cli.chat.events import Action, Event, Task
from alora_serve.cli.chat.keyboard import Keyboard
from alora_serve.cli.chat.state import Chat
from alora_serve.cli.chat.view import View
from alora_serve.cli.conversation import read_prompt
from alora_serve.errors import AloraServeError, InvalidRequestError


class Shell:
    """Runs one chat from its first line to its last.

    Attributes:
        chat: where it stands.
        had_errors: something that was asked for failed or could not be done.
    """

    def __init__(self, chat: Chat, calls: Calls, view: View) -> None:
        """``chat`` is how it begins."""
        self.chat = chat
        self.had_errors = False
        self._calls = calls
        self._view = view

    def run(self, keyboard: Keyboard) -> None:
        """Read and do until the user leaves."""
        while self._goes_on_after(self._next_line(keyboard)):
            pass

    def _next_line(self, keyboard: Keyboard) -> Event:
        try:
            self._view.waiting()
            line = keyboard.read()
        except KeyboardInterrupt:
            return events.Stopped()
        return events.Ended() if line is None else events.Line(line)

    def _goes_on_after(self, event: Event) -> bool:
        """Do all that an event leads to."""
        self.chat, actions = self.chat.on(event)
        due: deque[Action] = deque(actions)
        while due:
            match due.popleft():
                case events.Leave():
                    return False
                case (events.Answer() | events.Judge() | events.ListAdapters() | events.Load() | events.Save()) as task:
                    self.chat, actions = self.chat.on(self._outcome(task))
                    due.extend(actions)
                case shown:
                    self._show(shown)
        return True

    def _outcome(self, task: Task) -> Event:
        said: list[str] = []
        event: Event
        try:
            return self._carry_out(task, said)
        except AloraServeError as error:
            event = events.Failed(error)
        except KeyboardInterrupt:
            event = events.Stopped("".join(said))
        if said and isinstance(task, events.Answer):
            self._view.broken_off(task.adapter, "".join(said))
        return event

    def _carry_out(self, task: Task, said: list[str]) -> Event:
        """Do it; ``said`` is given what an answer has come to, as it comes.

        Raises:
            AloraServeError: it could not be done.
        """
        match task:
            case events.Answer():
                return self._answer(task, said)
            case events.Judge():
                return self._judge(task)
            case events.ListAdapters():
                listed = self._calls.adapters()
                self._view.adapters(listed)
                return events.Listed(listed)
            case events.Load(file):
                # An absolute path is never taken for standard input, as - would be.
                return events.Loaded(Conversation.of(read_prompt(file=file.absolute())))
            case events.Save(file, content):
                try:
                    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
                except OSError as error:
                    raise InvalidRequestError.of("save", f"cannot write {file}: {error.strerror}") from error
                self._view.note(f"saved to {file}")
                return events.Saved()

    def _answer(self, task: events.Answer, said: list[str]) -> Event:
        with self._calls.answer(task.prompt, task.adapter) as stream:
            for event in stream:
                if text := text_of(event):
                    said.append(text)
                    self._view.text(task.adapter, text)
            result = stream.result()
        self._view.answered(task.adapter, result)
        return events.Answered(result)

    def _judge(self, task: events.Judge) -> Event:
        verdicts = []
        for verdict in self._calls.judge(task.prompt, task.whole, task.names):
            verdicts.append(verdict)
            self.had_errors |= verdict.error is not None
            self._view.verdict(verdict)
        return events.Judged(tuple(verdicts))

    def _show(self, action: events.Shown) -> None:
        match action:
            case events.Note(text):
                self._view.note(text)
            case events.Refuse(problem):
                self.had_errors = True
                self._view.refused(problem)
            case events.Report(error):
                self.had_errors = True
                self._view.failed(error)
            case events.ShowUsage(costs):
                self._view.usage(costs)
            case events.ShowHelp():
                self._view.commands()

"""The chat as a state machine: an event comes, the next state and what is to be done go. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from alora_serve.cli.chat import events
from alora_serve.cli.chat.commands import OFF, Command, Misunderstood, Say, nearest, parse
from alora_serve.cli.chat.conversation import Conversation
from alora_serve.cli.chat.events import Action, Event, Note, Refuse, Task
from alora_serve.cli.conversation import conversation_to_json
from alora_serve.cli.verdicts import Cost, Verdict, untyped
from alora_serve.client import GenerationResult
from alora_serve.errors import AloraServeError, HandleExpiredError, HandleInvalidError, ModelMismatchError
from alora_serve.types import AdapterInfo

_SHOWN_CHARACTERS: Final = 60
_HANDLE_REFUSED: Final = (HandleExpiredError, HandleInvalidError, ModelMismatchError)


@dataclass(frozen=True, slots=True)
class Chat:
    """Where the chat stands between two events.

    Attributes:
        conversation: with the user's turn that is being answered.
        intrinsics: asked after every turn.
        adapters: names of those that the router listed last.
        typed: those of them that are intrinsics by an ``io.yaml``, which says how to ask them.
        aside: adapter and text of the last answer that stays outside of the conversation.
        costs: of the last turn.
        task: what is being done.
        before: the conversation to return to if that comes to nothing.
        stopping: the next Ctrl-C leaves.
    """

    conversation: Conversation = field(default_factory=Conversation)
    intrinsics: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    typed: frozenset[str] = frozenset()
    aside: tuple[str, str] | None = None
    costs: tuple[Cost, ...] = ()
    task: Task | None = None
    before: Conversation = field(default_factory=Conversation)
    stopping: bool = False

    def knowing(self, adapters: Sequence[AdapterInfo]) -> Chat:
        """With these for the adapters that there are."""
        names = tuple(adapter.name for adapter in adapters)
        return replace(self, adapters=names, typed=frozenset(names) - untyped(adapters))

    def on(self, event: Event) -> tuple[Chat, tuple[Action, ...]]:
        """What an event leads to. At most one of the actions is a :data:`Task`, and it is the last."""
        idle = replace(self, task=None)
        match event:
            case events.Line(text):
                return replace(idle, stopping=False)._line(text)
            case events.Answered(result):
                return idle._answered(result, self.task)
            case events.Judged(verdicts):
                return idle._judged(verdicts), ()
            case events.Listed(adapters):
                return idle.knowing(adapters), ()
            case events.Loaded(conversation):
                rest = "; the last one has no answer yet: /retry has it answered" if conversation.awaits_answer else ""
                count = len(conversation.messages)
                note = Note(f"{count} {'turn' if count == 1 else 'turns'}{rest}")
                return replace(idle, conversation=conversation, aside=None, costs=()), (note,)
            case events.Saved():
                return idle, ()
            case events.Stopped(text):
                return replace(idle, stopping=True)._stopped(text, self)
            case events.Failed(error):
                return idle._failed(error, self.task)
            case events.Ended():
                return idle, (events.Leave(),)

    def _line(self, text: str) -> tuple[Chat, tuple[Action, ...]]:
        match parse(text):
            case None:
                return self, ()
            case Misunderstood(problem):
                return self, (Refuse(problem),)
            case Say(text):
                return self._have_answered(self.conversation.said("user", text))
            case Command(name, argument):
                return self._command(name, argument)

    def _command(self, name: str, argument: str) -> tuple[Chat, tuple[Action, ...]]:
        match name:
            case "adapter":
                return self._ask_adapter(argument)
            case "keep":
                return self._keep()
            case "intrinsics":
                return self._choose_intrinsics(tuple(dict.fromkeys(argument.split())))
            case "adapters":
                return self._do(events.ListAdapters())
            case "system":
                return self._tell_system(argument)
            case "undo":
                return self._undo()
            case "retry":
                return self._retry()
            case "usage":
                return self, (events.ShowUsage(self.costs) if self.costs else Refuse("nothing was asked yet"),)
            case "save":
                return self._save(Path(argument).expanduser())
            case "load":
                return self._do(events.Load(Path(argument).expanduser()))
            case "help":
                return self, (events.ShowHelp(),)
            case _:
                return self, (events.Leave(),)

    # --- commands -----------------------------------------------------------------------------------------------------

    def _ask_adapter(self, name: str) -> tuple[Chat, tuple[Action, ...]]:
        if self.conversation.is_empty:
            return self, (Refuse("there is nothing to ask an adapter about yet: say something first"),)
        return self._do(self._judging(name) if name in self.typed else events.Answer(self.conversation.prompt(), name))

    def _keep(self) -> tuple[Chat, tuple[Action, ...]]:
        if self.aside is None:
            return self, (Refuse("no adapter has answered that could be kept: /adapter NAME asks one"),)
        name, text = self.aside
        kept = replace(self, conversation=self.conversation.said("assistant", text), aside=None)
        return kept, (Note(f"what {name} said is the assistant's turn now"),)

    def _choose_intrinsics(self, names: tuple[str, ...]) -> tuple[Chat, tuple[Action, ...]]:
        if names == (OFF,):
            return replace(self, intrinsics=()), (Note("no intrinsics from now on"),)
        if not names:
            return self, (Note(f"after every turn: {', '.join(self.intrinsics) or 'nothing'}"),)
        if problem := unknown(names, self.adapters):
            return self, (Refuse(f"{problem}; /adapters looks for new ones"),)
        return replace(self, intrinsics=names), (Note(f"after every turn: {', '.join(names)}"),)

    def _tell_system(self, text: str) -> tuple[Chat, tuple[Action, ...]]:
        system = self.conversation.system
        if not text:
            return self, (Note("the system says nothing" if system is None else f"the system says: {system}"),)
        told = replace(self, conversation=self.conversation.told(None if text == OFF else text))
        anew = "" if self.conversation.is_empty else "; all of the conversation is computed anew"
        return told, (Note(f"the system says {'nothing' if text == OFF else 'this'} from now on{anew}"),)

    def _undo(self) -> tuple[Chat, tuple[Action, ...]]:
        left = self.conversation.undone()
        if left == self.conversation:
            return self, (Refuse("there is no turn of yours to take back"),)
        taken = self.conversation.messages[len(left.messages)].content
        shown = taken if len(taken) <= _SHOWN_CHARACTERS else f"{taken[: _SHOWN_CHARACTERS - 4]} ..."
        return replace(self, conversation=left, aside=None), (Note(f"taken back: {shown}"),)

    def _retry(self) -> tuple[Chat, tuple[Action, ...]]:
        if self.conversation.is_empty:
            return self, (Refuse("there is no turn to answer yet"),)
        asked = self.conversation if self.conversation.awaits_answer else self.conversation.unanswered()
        if not asked.awaits_answer:
            return self, (Refuse("there is no turn of yours that could be answered"),)
        return self._have_answered(asked)

    def _save(self, file: Path) -> tuple[Chat, tuple[Action, ...]]:
        if self.conversation.is_empty:
            return self, (Refuse("there is nothing to save yet"),)
        return self._do(events.Save(file, conversation_to_json(self.conversation.whole())))

    # --- what comes of tasks ------------------------------------------------------------------------------------------

    def _have_answered(self, asked: Conversation) -> tuple[Chat, tuple[Action, ...]]:
        turn = replace(self, conversation=asked, aside=None, costs=())
        return turn._do(events.Answer(asked.prompt()), before=self.conversation)

    def _do(self, task: Task, *, before: Conversation | None = None) -> tuple[Chat, tuple[Action, ...]]:
        return replace(self, task=task, before=self.conversation if before is None else before), (task,)

    def _answered(self, result: GenerationResult, task: Task | None) -> tuple[Chat, tuple[Action, ...]]:
        adapter = task.adapter if isinstance(task, events.Answer) else ""
        charged = self._charged(Cost(adapter, result.usage, result.timings))
        if adapter:
            return replace(charged, aside=(adapter, result.text)), ()
        answered = replace(charged, conversation=self.conversation.said("assistant", result.text, result.handle))
        if not answered.intrinsics:
            return answered, ()
        return answered._do(answered._judging(*answered.intrinsics))

    def _judging(self, *names: str) -> events.Judge:
        return events.Judge(self.conversation.prompt(), self.conversation.whole(), names)

    def _judged(self, verdicts: Sequence[Verdict]) -> Chat:
        answered = [verdict for verdict in verdicts if verdict.cost is not None]
        charged = self._charged(*(verdict.cost for verdict in answered if verdict.cost is not None))
        return replace(charged, aside=(answered[-1].name, answered[-1].text) if answered else None)

    def _charged(self, *costs: Cost) -> Chat:
        return replace(self, costs=(*self.costs, *costs))

    def _stopped(self, text: str, running: Chat) -> tuple[Chat, tuple[Action, ...]]:
        if running.task is None:
            if running.stopping:
                return self, (events.Leave(),)
            return self, (Note("Ctrl-C again or /quit leaves"),)
        if not isinstance(running.task, events.Answer) or running.task.adapter:
            return self, (Note("stopped"),)
        if not text:
            taken = replace(self, conversation=self.before)
            return taken, (Note("stopped before anything had come: the conversation is as it was before"),)
        kept = replace(self, conversation=self.conversation.said("assistant", text))
        return kept, (Note("stopped; what had come is kept: /retry has it answered again, /undo takes it back"),)

    def _failed(self, error: AloraServeError, task: Task | None) -> tuple[Chat, tuple[Action, ...]]:
        if isinstance(error, _HANDLE_REFUSED) and isinstance(task, events.Answer | events.Judge) and task.prompt.handle:
            anew = replace(self, conversation=self.conversation.without_handles(), before=self.before.without_handles())
            note = Note("the server takes its handle of this conversation no more: all of it is sent again")
            again, actions = anew._do(replace(task, prompt=anew.conversation.prompt()), before=anew.before)
            return again, (note, *actions)
        failed = replace(self, conversation=self.before) if isinstance(task, events.Answer) else self
        return failed, (events.Report(error),)


def unknown(names: Iterable[str], adapters: tuple[str, ...]) -> str:
    """What is wrong with the first of ``names`` that is no adapter; empty when all are."""
    for name in names:
        if name not in adapters:
            return f"no adapter named {name!r}{nearest(name, adapters)}"
    return ""

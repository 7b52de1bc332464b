"""The chat's core, without a server: what it asks for, and that its prompts always mean the whole conversation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.cli.chat import events
from alora_serve.cli.chat.conversation import Conversation
from alora_serve.cli.chat.events import Answer, Answered, Failed, Judge, Judged, Leave, Line, Note, Refuse, Stopped
from alora_serve.cli.chat.state import Chat, unknown
from alora_serve.cli.verdicts import Cost, Verdict
from alora_serve.client import GenerationResult
from alora_serve.errors import HandleExpiredError, UnavailableError
from alora_serve.rpc.convert import prompt_from_proto, prompt_to_proto
from alora_serve.types import (
    AdapterDigest,
    AdapterInfo,
    ChatMessage,
    Document,
    FinishReason,
    PrefixHandle,
    Prompt,
    PromptKind,
    Timings,
    ToolCall,
    Usage,
)

TIDES = Conversation(
    documents=(Document("Tides", "They follow the moon."),),
    tools=({"type": "function", "function": {"name": "tide"}},),
    template_arguments={"date": "today"},
)
"""A conversation that is yet to begin, with all that stands before its first turn."""
PLAIN = AdapterInfo("a", AdapterDigest("ab"), "alora", 8, ("q_proj",), (1,), "", 64, True)
GOOD, EXPIRED, GONE = "good", HandleExpiredError("expired"), UnavailableError("gone")


class Server:
    """Knows which conversation each handle that it gave stands for."""

    def __init__(self) -> None:
        self._known: list[Prompt] = []

    def means(self, prompt: Prompt) -> Prompt:
        """The conversation that a prompt continues, read as services do, which refuse some parts beside a handle."""
        read = prompt_from_proto(prompt_to_proto(prompt))
        if read.handle is None:
            return read
        known = self._known[read.handle.expires_unix_seconds]
        return replace(known, messages=known.messages + read.messages)

    def answers(self, prompt: Prompt, text: str, adapter: str = "") -> Answered:
        """An answer, with a handle unless an adapter gives it."""
        asked = self.means(prompt)
        self._known.append(replace(asked, messages=(*asked.messages, ChatMessage("assistant", text))))
        number = len(self._known) - 1
        handle = PrefixHandle(b"", b"", (number,), (), PromptKind.CONVERSATION, "assistant", True, number)
        result = GenerationResult(
            text=text,
            token_ids=(),
            finish_reason=FinishReason.STOP,
            usage=Usage(prompt_tokens=len(asked.messages)),
            timings=Timings(),
            handle=None if adapter else handle,
            stop_string="",
            logprobs=(),
            adapter_digest=AdapterDigest(adapter),
            seed=0,
        )
        return Answered(result)


class Talk:
    """A chat with a server that answers what it is asked."""

    def __init__(self, chat: Chat | None = None) -> None:
        self.server = Server()
        self.chat = chat or Chat(adapters=("guard", "certain"))
        self.asked: list[events.Action] = []

    def on(self, event: events.Event) -> list[events.Action]:
        """Let it happen, and nothing after it."""
        self.chat, actions = self.chat.on(event)
        return list(actions)

    def say(self, line: str) -> list[events.Action]:
        """Type a line and have all that follows done; what was asked for, in order."""
        due, done = self.on(Line(line)), []
        while due:
            done.append(action := due.pop(0))
            match action:
                case Answer(prompt, adapter):
                    due += self.on(self.server.answers(prompt, f"{adapter or 'base'} says {len(done)}", adapter))
                case Judge(_, _, names):
                    cost = Cost("", Usage(), Timings())
                    due += self.on(Judged(tuple(Verdict(name, {"is": True}, "yes", cost) for name in names)))
                case events.ListAdapters() | events.Load() | events.Save():
                    raise AssertionError(f"{action} ends in an event that a test has to give")
        return done

    @property
    def turns(self) -> list[str]:
        return [f"{message.role}: {message.content}" for message in self.chat.conversation.messages]


@pytest.fixture
def talk() -> Talk:
    return Talk()


def test_each_turn_goes_on_from_the_handle_of_the_last_one(talk: Talk) -> None:
    (first,) = talk.say("one")
    assert first == Answer(Prompt(messages=(ChatMessage("user", "one"),)))
    (second,) = talk.say("two")
    assert isinstance(second, Answer)
    assert second.prompt.handle is not None
    assert second.prompt.messages == (ChatMessage("user", "two"),)


def test_documents_and_tools_are_sent_with_the_first_turn_and_lie_in_every_handle_then() -> None:
    talk = Talk(Chat(conversation=TIDES))
    (first,) = talk.say("one")
    assert isinstance(first, Answer)
    assert (first.prompt.documents, first.prompt.tools) == (TIDES.documents, TIDES.tools)
    (second,) = talk.say("two")
    assert isinstance(second, Answer)
    assert second.prompt.handle is not None
    assert (second.prompt.documents, second.prompt.tools) == ((), ())
    assert second.prompt.template_arguments == TIDES.template_arguments
    assert talk.server.means(second.prompt).documents == TIDES.documents
    talk.say("/system Be short.")
    (anew,) = talk.say("three")
    assert isinstance(anew, Answer)
    assert (anew.prompt.handle, anew.prompt.documents) == (None, TIDES.documents)


def test_an_adapter_answers_from_the_handle_and_stays_outside_unless_kept(talk: Talk) -> None:
    talk.say("one")
    (asked,) = talk.say("/adapter guard")
    assert isinstance(asked, Answer)
    assert (asked.adapter, asked.prompt.messages) == ("guard", ())
    assert asked.prompt.handle is not None
    assert talk.turns == ["user: one", "assistant: base says 1"]
    talk.say("/keep")
    assert talk.turns[2:] == ["assistant: guard says 1"]
    assert isinstance(talk.say("/keep")[0], Refuse)
    (after,) = talk.say("two")
    assert isinstance(after, Answer)
    assert [message.content for message in after.prompt.messages] == ["guard says 1", "two"]


def test_an_adapter_with_an_io_yaml_is_asked_as_that_says(talk: Talk) -> None:
    talk.on(events.Listed(tuple(replace(PLAIN, name=name, intrinsic_digest=d) for name, d in (("a", ""), ("b", "12")))))
    talk.say("one")
    assert isinstance(talk.say("/adapter a")[0], Answer)
    (judge,) = talk.say("/adapter b")
    assert isinstance(judge, Judge)
    assert judge.names == ("b",)
    talk.say("/keep")
    assert talk.turns[2:] == ["assistant: yes"]


def test_an_answer_from_before_the_last_turn_cannot_be_kept(talk: Talk) -> None:
    talk.say("one")
    talk.say("/adapter guard")
    talk.say("two")
    assert isinstance(talk.say("/keep")[0], Refuse)


def test_intrinsics_run_after_every_turn_until_they_are_off(talk: Talk) -> None:
    assert talk.say("/intrinsics guard certain guard") == [Note("after every turn: guard, certain")]
    _, judge = talk.say("one")
    assert isinstance(judge, Judge)
    assert judge.names == ("guard", "certain")
    assert judge.prompt.handle is not None
    assert talk.server.means(judge.prompt) == judge.whole == talk.chat.conversation.whole()
    assert talk.say("/intrinsics") == [Note("after every turn: guard, certain")]
    assert talk.say("/intrinsics off") == [Note("no intrinsics from now on")]
    assert len(talk.say("two")) == 1


def test_an_intrinsic_that_is_not_served_is_refused_with_the_nearest_name(talk: Talk) -> None:
    (refused,) = talk.say("/intrinsics gaurd")
    assert refused == Refuse("no adapter named 'gaurd', did you mean guard?; /adapters looks for new ones")
    assert talk.on(Line("/adapters")) == [events.ListAdapters()]
    talk.on(events.Listed(()))
    assert unknown(["guard"], talk.chat.adapters) == "no adapter named 'guard'"
    assert unknown([], ()) == ""


def test_usage_is_that_of_the_last_turn_and_all_that_was_asked_about_it(talk: Talk) -> None:
    assert isinstance(talk.say("/usage")[0], Refuse)
    talk.say("one")
    talk.say("two")
    talk.say("/adapter guard")
    (shown,) = talk.say("/usage")
    assert isinstance(shown, events.ShowUsage)
    assert [cost.who for cost in shown.costs] == ["", "guard"]


def test_undo_takes_the_last_turn_back_with_all_that_followed(talk: Talk) -> None:
    assert isinstance(talk.say("/undo")[0], Refuse)
    talk.say("one")
    before = talk.chat.conversation
    talk.say("two " + "x" * 80)
    talk.say("/adapter guard")
    talk.say("/keep")
    (note,) = talk.say("/undo")
    assert isinstance(note, Note)
    assert note.text == f"taken back: two {'x' * 52} ..."
    assert talk.chat.conversation == before


def test_retry_has_the_last_turn_answered_again(talk: Talk) -> None:
    assert isinstance(talk.say("/retry")[0], Refuse)
    talk.say("one")
    talk.say("two")
    (again,) = talk.say("/retry")
    assert isinstance(again, Answer)
    assert again.prompt.messages == (ChatMessage("user", "two"),)
    assert len(talk.turns) == 4


def test_a_loaded_conversation_that_nobody_answered_is_answered_by_retry(talk: Talk) -> None:
    call = ChatMessage("assistant", "", tool_calls=(ToolCall("1", "tide", "{}"),))
    loaded = Conversation(messages=(ChatMessage("user", "tide?"), call, ChatMessage("tool", "high", tool_call_id="1")))
    assert talk.on(Line("/load ~/x.json")) == [events.Load(Path("~/x.json").expanduser())]
    (note,) = talk.on(events.Loaded(loaded))
    assert note == Note("3 turns; the last one has no answer yet: /retry has it answered")
    (asked,) = talk.say("/retry")
    assert isinstance(asked, Answer)
    assert asked.prompt.messages == loaded.messages
    assert isinstance(
        Talk(Chat(conversation=Conversation((ChatMessage("assistant", "Hi."),)))).say("/retry")[0], Refuse
    )


def test_the_system_speaks_first_and_no_handle_survives_that(talk: Talk) -> None:
    assert talk.say("/system") == [Note("the system says nothing")]
    assert talk.say("/system Be short.") == [Note("the system says this from now on")]
    assert talk.chat.conversation.is_empty
    assert isinstance(talk.say("/adapter guard")[0], Refuse)
    talk.say("one")
    (note,) = talk.say("/system Be long.")
    assert note == Note("the system says this from now on; all of the conversation is computed anew")
    assert talk.chat.conversation.prompt().handle is None
    assert talk.turns == ["system: Be long.", "user: one", "assistant: base says 1"]
    assert talk.say("/system") == [Note("the system says: Be long.")]
    talk.say("/system off")
    assert talk.turns == ["user: one", "assistant: base says 1"]


def test_what_is_saved_is_the_whole_conversation_without_handles(talk: Talk) -> None:
    assert isinstance(talk.say("/save x")[0], Refuse)
    talk.say("one")
    (save,) = talk.on(Line("/save x.json"))
    assert isinstance(save, events.Save)
    assert save.content == {
        "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "base says 1"}]
    }
    assert talk.on(events.Saved()) == []


def test_a_stopped_answer_is_kept_as_far_as_it_came_without_a_handle(talk: Talk) -> None:
    talk.say("one")
    talk.on(Line("two"))
    (note,) = talk.on(Stopped("half an ans"))
    assert isinstance(note, Note)
    assert talk.turns[2:] == ["user: two", "assistant: half an ans"]
    (after,) = talk.say("three")
    assert isinstance(after, Answer)
    assert len(after.prompt.messages) == 3
    assert len(talk.server.means(after.prompt).messages) == 5


def test_an_answer_stopped_before_it_began_leaves_no_trace(talk: Talk) -> None:
    talk.say("one")
    before = talk.chat.conversation
    talk.on(Line("two"))
    talk.on(Stopped(""))
    assert talk.chat.conversation == before
    talk.on(Line("/adapter guard"))
    assert talk.on(Stopped("ye")) == [Note("stopped")]
    assert talk.chat.conversation == before


def test_ctrl_c_twice_leaves_and_once_does_not(talk: Talk) -> None:
    assert talk.on(Stopped()) == [Note("Ctrl-C again or /quit leaves")]
    talk.say("one")
    talk.on(Stopped())
    assert talk.on(Stopped()) == [Leave()]
    talk.on(Line("two"))
    talk.on(Stopped("ha"))
    assert talk.on(Stopped()) == [Leave()], "the first stopped the answer"


def test_the_end_of_input_and_quit_leave(talk: Talk) -> None:
    assert talk.on(events.Ended()) == [Leave()]
    assert talk.say("/quit") == [Leave()]
    assert talk.say("/help") == [events.ShowHelp()]
    assert talk.say(" ") == []


@pytest.mark.parametrize("line", ["two", "/adapter guard"])
def test_a_refused_handle_is_replaced_by_the_whole_conversation_once(talk: Talk, line: str) -> None:
    talk.say("one")
    talk.on(Line(line))
    note, again = talk.on(Failed(EXPIRED))
    assert isinstance(note, Note)
    assert isinstance(again, Answer)
    assert again.prompt.handle is None
    assert again.prompt.messages == talk.chat.conversation.messages
    assert talk.on(Failed(EXPIRED)) == [events.Report(EXPIRED)]
    assert talk.turns == ["user: one", "assistant: base says 1"]


def test_intrinsics_too_are_asked_again_without_the_handle(talk: Talk) -> None:
    talk.say("/intrinsics guard")
    (answer,) = talk.on(Line("one"))
    assert isinstance(answer, Answer)
    (judge,) = talk.on(talk.server.answers(answer.prompt, "yes"))
    assert isinstance(judge, Judge)
    _, again = talk.on(Failed(EXPIRED))
    whole = Prompt(messages=talk.chat.conversation.messages)
    assert again == Judge(whole, whole, ("guard",))


def test_a_failed_turn_is_taken_back(talk: Talk) -> None:
    talk.say("one")
    before = talk.chat.conversation
    talk.on(Line("two"))
    assert talk.on(Failed(GONE)) == [events.Report(GONE)]
    assert talk.chat.conversation == before


LINES = st.sampled_from(
    [
        "one",
        "two",
        "/adapter guard",
        "/keep",
        "/undo",
        "/retry",
        "/system Be short.",
        "/system off",
        "/intrinsics guard certain",
        "/intrinsics off",
        "/usage",
        "",
        "/nonsense",
    ]
)
OUTCOMES = st.sampled_from([GOOD, GOOD, GOOD, "stopped", "stopped early", EXPIRED, GONE])


@given(
    st.sampled_from([Conversation(), TIDES]),
    st.lists(st.tuples(LINES, st.lists(OUTCOMES, min_size=4, max_size=4)), max_size=12),
)
def test_whatever_happens_a_prompt_means_the_whole_conversation(
    begun: Conversation, script: list[tuple[str, list[object]]]
) -> None:
    talk = Talk(Chat(conversation=begun, adapters=("guard", "certain")))
    for line, outcomes in script:
        due = talk.on(Line(line))
        for outcome in outcomes:
            tasks = [action for action in due if isinstance(action, Answer | Judge)]
            assert tasks in ([], due[-1:])
            if not tasks:
                break
            (task,) = tasks
            assert talk.server.means(task.prompt) == talk.chat.conversation.whole()
            if isinstance(outcome, Exception):
                due = talk.on(Failed(outcome))  # type: ignore[arg-type]
            elif outcome != GOOD:
                due = talk.on(Stopped("hal" if outcome == "stopped" else ""))
            elif isinstance(task, Answer):
                due = talk.on(talk.server.answers(task.prompt, "said", task.adapter))
            else:
                due = talk.on(Judged(()))
        if talk.chat.task is not None:
            talk.on(Stopped(""))
        if talk.chat.conversation.messages:
            assert talk.server.means(talk.chat.conversation.prompt()) == talk.chat.conversation.whole()

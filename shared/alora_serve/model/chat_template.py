"""A model's chat template: what it can take, and a conversation rendered with the user's special-token text cut."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alora_serve.errors import InvalidRequestError, UnimplementedFeatureError
from alora_serve.model.template_guard import CutText, RequestGuard
from alora_serve.model.template_input import Mark, TemplateInput, check_arguments
from alora_serve.types import ROLES, ChatMessage, ToolCall

_HELPERS = ("self", "messages", "conversations", "raise_exception", "strftime_now", "dict", "namespace")
_LOOKED_UP = re.compile(r"""(?:['"]|\.\s*)(\w+)""")
"""Names that may be keys in the template's eyes: ``tool.function``, ``tool['function']``, ``'enum' in tool``."""
_TEMPLATE_FAILURES = (
    TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip
"""What a template can raise on input that it was not written for; it is a program and its input comes from the user."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """One conversation as text: only its closed turns, and the same with the generation prompt of the next answer."""

    closed: CutText
    open: CutText

    def before(self, marker: str) -> str:
        """The closed turns up to the last occurrence of ``marker``; empty when it does not occur."""
        return self.closed.text.rpartition(marker)[0]

    def after(self, marker: str) -> Rendering:
        """What follows the last occurrence of ``marker``, in both.

        Raises :class:`~alora_serve.errors.InvalidRequestError` when the template dropped it.
        """
        places = [text.text.rfind(marker) for text in (self.closed, self.open)]
        if min(places) < 0:
            raise not_continuable("the last turn does not show by itself")
        ends = (place + len(marker) for place in places)
        return Rendering(*(text.part(end) for text, end in zip((self.closed, self.open), ends, strict=True)))


def not_continuable(reason: str) -> InvalidRequestError:
    """The error for a handle that this template cannot add turns to."""
    return InvalidRequestError.of(
        "prompt.messages",
        f"this model's chat template cannot continue a handle here ({reason}); send all messages instead of a handle",
    )


class ChatTemplate:
    """The template of one tokenizer. Stateless; Jinja runs in the sandbox that transformers sets up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = frozenset((*parameters, *tokenizer.special_tokens_map, *_HELPERS))
        template = tokenizer.chat_template or ""
        self._sources = tuple(template.values()) if isinstance(template, dict) else (template,)
        self._looked_up = frozenset(name for source in self._sources for name in _LOOKED_UP.findall(source))

    def mentions(self, name: str) -> bool:
        """Whether the template uses a variable, field or function of that name."""
        return any(re.search(rf"\b{name}\b", source) for source in self._sources)

    def check(self, request: TemplateInput) -> None:
        """Refuse what the template would drop in silence, and arguments that would replace our own variables.

        Raises :class:`~alora_serve.errors.UnimplementedFeatureError` and
        :class:`~alora_serve.errors.InvalidRequestError`.
        """
        if not any(self._sources):
            raise InvalidRequestError.of("prompt.messages", "this model has no chat template; send token_ids")
        check_arguments(request.arguments, self._reserved)
        if request.documents and not self.mentions("documents"):
            raise UnimplementedFeatureError.of("prompt.documents")
        if request.tools and not self.mentions("tools"):
            raise UnimplementedFeatureError.of("prompt.tools_json")
        for index, message in enumerate(request.messages):
            if message.role not in ROLES and not self.mentions("document"):
                raise UnimplementedFeatureError.of(f"prompt.messages[{index}].role")
            if message.tool_calls and not self.mentions("tool_calls"):
                raise UnimplementedFeatureError.of(f"prompt.messages[{index}].tool_calls")

    def render(self, request: TemplateInput, guard: RequestGuard) -> Rendering:
        """Render without and with the generation prompt.

        Raises :class:`~alora_serve.errors.InvalidRequestError` with the template's own message when it refuses the
        conversation.
        """
        return Rendering(*(guard.render(self._renderer(request, guard, prompt)) for prompt in (False, True)))

    def _renderer(self, request: TemplateInput, guard: RequestGuard, prompt: bool) -> Callable[[Mark], str]:
        def render(mark: Mark) -> str:
            try:
                text = str(
                    self._tokenizer.apply_chat_template(
                        **request.variables(mark, self._looked_up), add_generation_prompt=prompt, tokenize=False
                    )
                )
            except _TEMPLATE_FAILURES as error:
                reason = guard.clean(str(error)) or type(error).__name__
                raise InvalidRequestError.of("prompt.messages", f"refused by the chat template: {reason}") from error
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequestError.of("prompt", f"holds half of a surrogate pair: {error}") from error
            return text

        return render

    def stand_in(self, last_role: str, content: str) -> tuple[ChatMessage, ...]:
        """The shortest conversation that ends with a turn of that role and content, for measuring what follows it."""
        question = ChatMessage("user", "-")
        match last_role:
            case "assistant":
                return question, ChatMessage("assistant", content)
            case "tool":
                # Nine characters, because some templates insist on an identifier of that length.
                calls = (ToolCall("call00000", "f", "{}"),) if self.mentions("tool_calls") else ()
                answer = ChatMessage("assistant", "", tool_calls=calls)
                return question, answer, ChatMessage("tool", content, tool_call_id="call00000", name="f")
            case _:
                return (ChatMessage(last_role, content),)

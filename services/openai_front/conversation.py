"""What a body says of a conversation: messages, documents, tools and arguments of the chat template."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictInt, Tag

from alora_serve.client import ChatMessage, Document, Prompt, ToolCall
from alora_serve.errors import InvalidRequestError
from openai_front.request_fields import Body, Ignored, Text


class TextPart(Body):
    """A part of a message. There are no others than text here."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Ignored = None


class RefusalPart(Body):
    """What the assistant said when it refused: text, too."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """What it said."""
        return self.refusal


def _part_kind(value: object) -> str:
    is_refusal = isinstance(value, dict) and value.get("type") == "refusal"
    return "refusal part" if is_refusal else "text part"


Part = Annotated[
    Annotated[TextPart, Tag("text part")] | Annotated[RefusalPart, Tag("refusal part")], Discriminator(_part_kind)
]


class FunctionCall(Body):
    """What a tool is called with."""

    name: Text
    arguments: Text
    parsed_arguments: Ignored = None


class MessageToolCall(Body):
    """A call that the assistant made."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Ignored = None

    def to_domain(self) -> ToolCall:
        """As the client takes it."""
        return ToolCall(self.id, self.function.name, self.function.arguments)


def _content_kind(value: object) -> str:
    return "parts" if isinstance(value, list) else "text"


Content = Annotated[Annotated[Text, Tag("text")] | Annotated[list[Part], Tag("parts")], Discriminator(_content_kind)]


class Message(Body):
    """One turn. Fields that answers carry are taken back with them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: Text | None = None
    parsed: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    reasoning: Ignored = None
    reasoning_content: Ignored = None
    audio: None = None
    function_call: None = None

    def to_domain(self) -> ChatMessage:
        """As the client takes it: parts on lines of their own, ``developer`` as the ``system`` that it replaced."""
        content = self.content or ""
        return ChatMessage(
            role="system" if self.role == "developer" else self.role,
            content=content if isinstance(content, str) else "\n".join(part.text for part in content),
            tool_calls=tuple(call.to_domain() for call in self.tool_calls or ()),
            tool_call_id=self.tool_call_id or "",
            name=self.name or "",
        )


class Function(Body):
    """A tool as the model is told of it."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored = None


class Tool(Body):
    """A tool. There are no others than functions here."""

    type: Literal["function"]
    function: Function

    def to_domain(self) -> dict[str, Any]:
        """As chat templates of the field take it."""
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"}, exclude_none=True)}


class RequestDocument(Body):
    """A document, in the names of Hugging Face's templates."""

    text: Text
    title: Text | None = None
    doc_id: Text | StrictInt | None = None

    def to_domain(self) -> Document:
        """As the client takes it."""
        return Document(self.title or "", self.text, "" if self.doc_id is None else str(self.doc_id))


class TemplateArguments(Body, extra="allow"):
    """Variables of the chat template, but for two that mean something here."""

    adapter_name: Text | None = None
    documents: list[RequestDocument] | None = None


class ConversationFields(Body):
    """The fields of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    documents: list[RequestDocument] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    tools: list[Tool] | None = None

    def prompt(self) -> Prompt:
        """What to continue.

        Raises:
            InvalidRequestError: documents in two places.
        """
        arguments = self.chat_template_kwargs or TemplateArguments()
        if self.documents and arguments.documents:
            raise InvalidRequestError.of("chat_template_kwargs.documents", "stand beside documents; give one of them")
        return Prompt(
            messages=tuple(message.to_domain() for message in self.messages),
            documents=tuple(each.to_domain() for each in self.documents or arguments.documents or ()),
            tools=tuple(tool.to_domain() for tool in self.tools or ()),
            template_arguments=dict(arguments.model_extra or {}),
        )

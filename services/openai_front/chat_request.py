"""The body of ``POST /v1/chat/completions``, and what it asks of the gRPC API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from alora_serve.client import SamplingParams
from alora_serve.errors import InvalidRequestError
from openai_front.conversation import ConversationFields
from openai_front.forms import AskedForm, ResponseFormat, ToolChoice, chosen_form
from openai_front.request_fields import MAX_TOP_LOGPROBS, CompletionFields, Ignored, Unsigned


class ChatRequest(ConversationFields, CompletionFields):
    """The whole body."""

    max_completion_tokens: Unsigned | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: ToolChoice | None = None
    modalities: list[Literal["text"]] | None = None

    parallel_tool_calls: StrictBool | None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    web_search_options: None = None
    moderation: None = None

    prediction: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None

    @property
    def adapter_names(self) -> dict[str, str | None]:
        """Each field that may name an adapter, and what it says."""
        arguments = self.chat_template_kwargs
        return {
            "adapter": self.adapter,
            "chat_template_kwargs.adapter_name": arguments.adapter_name if arguments else None,
        }

    @property
    def field_names(self) -> Mapping[str, str]:
        """What this request has for fields of the gRPC API, where it is not the same."""
        form, names = self._form(), {"prompt": "messages"}
        if form is not None:
            names["structured_output"] = form.field
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names

    def sampling_params(self) -> SamplingParams:
        """How to choose tokens.

        Raises:
            InvalidRequestError: fields that contradict each other.
        """
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequestError.of("max_completion_tokens", "contradicts max_tokens; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError.of("top_logprobs", "needs logprobs: true")
        form = self._form()
        return self.sampling(
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs,
            structured_output=form and form.form,
        )

    def _form(self) -> AskedForm | None:
        functions = [tool.function.model_dump() for tool in self.tools or ()]
        return chosen_form(self, self.response_format, self.tool_choice, functions)

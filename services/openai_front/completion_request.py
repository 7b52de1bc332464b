"""The body of ``POST /v1/completions``, and what it asks of the gRPC API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, StrictInt

from alora_serve.client import Prompt, SamplingParams
from alora_serve.errors import InvalidRequestError, UnimplementedFeatureError
from openai_front.forms import chosen_form
from openai_front.request_fields import MAX_TOP_LOGPROBS, CompletionFields, Number, Text, Unsigned

MAX_PROMPTS = 64


class CompletionRequest(CompletionFields):
    """The whole body. A prompt is text or token ids, and complete: no chat template comes to it."""

    prompt: Text | list[Unsigned] | list[Text] | list[list[Unsigned]]
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Unsigned | None = None
    echo: bool | None = None
    suffix: Text | None = None
    length_penalty: Number | None = None

    @property
    def adapter_names(self) -> dict[str, str | None]:
        """Each field that may name an adapter, and what it says."""
        return {"adapter": self.adapter}

    @property
    def field_names(self) -> Mapping[str, str]:
        """What this request has for fields of the gRPC API, where it is not the same."""
        form = chosen_form(self, None, None, ())
        return {} if form is None else {"structured_output": form.field}

    def prompts(self) -> list[Prompt]:
        """What to continue, each apart.

        Raises:
            InvalidRequestError: none, an empty one, or too many.
        """
        given = self.prompt
        single = isinstance(given, str) or all(isinstance(item, int) for item in given)
        prompts = [given] if single else list(given)
        if len(prompts) > MAX_PROMPTS:
            raise InvalidRequestError.of("prompt", f"{len(prompts)} prompts are more than {MAX_PROMPTS}")
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise InvalidRequestError.of("prompt" if single else f"prompt[{index}]", "is empty")
        return [
            Prompt(text=prompt) if isinstance(prompt, str) else Prompt(token_ids=tuple(prompt))  # type: ignore[arg-type]
            for prompt in prompts
        ]

    def sampling_params(self) -> SamplingParams:
        """How to choose tokens.

        Raises:
            UnimplementedFeatureError: a field of OpenAI's that is not served.
        """
        unserved = {
            "echo": bool(self.echo),
            "suffix": bool(self.suffix),
            "best_of": self.best_of not in (None, self.num_samples),
            "length_penalty": self.length_penalty not in (None, 1),
        }
        if any(unserved.values()):
            raise UnimplementedFeatureError.of(*(name for name, given in unserved.items() if given))
        form = chosen_form(self, None, None, ())
        return self.sampling(
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs,
            structured_output=form and form.form,
        )

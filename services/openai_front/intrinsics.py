"""``POST /v1/intrinsics``: several intrinsics on one conversation, an endpoint of our own beside OpenAI's."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Annotated, Any, Final, TypeVar

from pydantic import Field, StrictBool

from alora_serve.client import AsyncIntrinsicsStream, IntrinsicResult
from alora_serve.errors import AloraServeError
from openai_front.conversation import ConversationFields
from openai_front.event_stream import DONE, event
from openai_front.failures import failure_of
from openai_front.field_names import as_asked
from openai_front.request_fields import Text

MAX_INTRINSICS = 256

FIELD_NAMES: Final = {"prompt": "messages"}
"""What the body has for fields of the gRPC API, where it is not the same."""

Outcome = IntrinsicResult | AloraServeError
ResultT = TypeVar("ResultT")


class IntrinsicsRequest(ConversationFields):
    """The body: a conversation as in chat completions, and who judges it."""

    intrinsics: Annotated[list[Text], Field(min_length=1, max_length=MAX_INTRINSICS)]
    parameters: dict[str, Any] | None = None
    stream: StrictBool | None = None

    async def as_asked(self, outcome: Awaitable[ResultT]) -> ResultT:
        """What is awaited; its failure names fields of this request."""
        try:
            return await outcome
        except AloraServeError as error:
            raise as_asked(error, FIELD_NAMES) from error

    def outcome(self, index: int, outcome: Outcome) -> Mapping[str, Any]:
        """What one of them found, or why it found nothing."""
        named = {"index": index, "intrinsic": self.intrinsics[index]}
        if isinstance(outcome, AloraServeError):
            return {**named, **failure_of(as_asked(outcome, FIELD_NAMES)).body}
        found = dataclasses.asdict(outcome)
        costs = {name: found.pop(name) for name in ("usage", "timings")}
        return {**named, **found, "alora": costs}


async def outcome_events(
    request: IntrinsicsRequest, first: tuple[int, Outcome], stream: AsyncIntrinsicsStream
) -> AsyncGenerator[bytes]:
    """An event for each outcome as it comes, and one for what ends the call before all have."""
    async with stream:
        yield event(request.outcome(*first))
        try:
            async for index, outcome in stream:
                yield event(request.outcome(index, outcome))
        except AloraServeError as error:
            yield event(failure_of(as_asked(error, FIELD_NAMES)).body)
            return
    yield DONE

"""From chat messages to tokens and from tokens to text: a model's tokenizer and chat template, made safe to serve.

Ordinary conversations get exactly the tokens of ``apply_chat_template``. The generation prompt is rendered and
tokenized apart from the turns before it, so that the turns' tokens do not depend on what follows them. Where the
rendering with a generation prompt does not simply go on from the one without ("raw concatenation"), the prefix is what
both have in common, cut at a token's border, and the generation prompt is the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from alora_serve.errors import ContextExceededError, InvalidRequestError
from alora_serve.model.chat_template import ChatTemplate, Rendering, not_continuable
from alora_serve.model.plain_text import PlainTextTokenizer
from alora_serve.model.template_guard import CutText, RequestGuard
from alora_serve.model.template_input import TemplateInput, check_messages
from alora_serve.types import ROLES, ChatMessage, Document, PrefixHandle, PromptKind, TokenIds

_NO_ARGUMENTS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation as tokens.

    Attributes:
        prefix_tokens: every turn, closed; no generation prompt.
        generation_prompt_tokens: what the template puts before an assistant's answer; may be empty.
        last_role: role of the last turn; empty when the prefix is raw tokens.
    """

    prefix_tokens: TokenIds
    generation_prompt_tokens: TokenIds
    last_role: str


class ChatTokenizer:
    """One model's tokenizer. Immutable and thread-safe after construction."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_of_sequence_ids: Iterable[int] = (),
        *,
        context_tokens: int | None = None,
    ) -> None:
        """``end_of_sequence_ids`` are those of the model's config and generation config.

        Prompts that by their length cannot fit into ``context_tokens`` are refused before they are tokenized.

        Raises :class:`~alora_serve.errors.ModelUnsupportedError` for a tokenizer without a fast implementation.
        """
        self._tokens = PlainTextTokenizer(tokenizer)
        self._context_tokens = context_tokens
        self._template = ChatTemplate(tokenizer)
        self._chat_template = tokenizer.chat_template
        self._special_tokens = tokenizer.special_tokens_map
        self.end_of_sequence_ids: frozenset[int] = frozenset(end_of_sequence_ids) | self._turn_end()
        """Ids that end an answer: the configs' and the token with which the template closes an assistant's turn."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, added ones included. The model's embedding may have more rows."""
        return self._tokens.vocabulary_size

    @property
    def prints_date(self) -> bool:
        """Whether the template can print today's date, which ends all reuse at midnight unless a request sets it."""
        return self._template.mentions("strftime_now")

    @property
    def takes_documents(self) -> bool:
        """Whether the template has a place for documents."""
        return self._template.mentions("documents")

    @property
    def serialized(self) -> Mapping[str, Any]:
        """The tokenizer as in ``tokenizer.json``."""
        return self._tokens.serialized

    @cached_property
    def is_prefix_stable(self) -> bool:
        """Whether a generation prompt merely adds to the turns before it, tried on short conversations."""
        turns = (ChatMessage("user", "a"), ChatMessage("assistant", "b"), ChatMessage("user", "c"))
        try:
            renderings = [self._rendering(TemplateInput(turns[:count])) for count in (1, 3)]
        except InvalidRequestError:
            return False
        return all(rendering.open.text.startswith(rendering.closed.text) for rendering in renderings)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all that decides which tokens a conversation gets: the serialized tokenizer and templates."""
        state = [self._tokens.serialized, self._chat_template, self._special_tokens]
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).digest()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special tokens left out; an incomplete character shows as U+FFFD."""
        return self._tokens.decode(token_ids)

    def spell(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special tokens spelt out: for people, never for an answer."""
        return self._tokens.spell(token_ids)

    def least_tokens(self, text: str) -> int:
        """What a text comes to at least, without tokenizing it; 0 where that is not known."""
        return self._tokens.least_tokens(text)

    def encode_text(self, text: str) -> TokenIds:
        """Tokens of text that goes on after others; text of added tokens stays text.

        Raises:
            InvalidRequestError: a special token of a single character is in it, which cannot be text.
        """
        cuts = self._tokens.added_texts.cuts(text) - {0, len(text)}
        return self._tokens.encode(CutText(text, tuple(sorted(cuts))), at_start=False)

    def encode_invocation(self, text: str) -> TokenIds:
        """Tokens of text that its author means as a template is meant: names of added tokens are those tokens."""
        return self._tokens.encode(CutText(text), at_start=False)

    def raw(self, text: str) -> RenderedPrompt:
        """Tokens of a complete prompt, with no template: text of special tokens in it stands for them.

        Raises :class:`~alora_serve.errors.InvalidRequestError` for a text that comes to no token, or to too many.
        """
        self._check_fits(text)
        tokens = self._tokens.encode_raw(text)
        if not tokens:
            raise InvalidRequestError.of("prompt.text", "comes to no token in this model's vocabulary")
        return RenderedPrompt(tokens, (), "")

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        documents: Sequence[Document] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        template_arguments: Mapping[str, Any] = _NO_ARGUMENTS,
    ) -> RenderedPrompt:
        """Tokens of a whole conversation.

        Text of added tokens inside the user's strings stays text. Raises
        :class:`~alora_serve.errors.InvalidRequestError` for a conversation that is empty, malformed or refused by the
        template, and :class:`~alora_serve.errors.UnimplementedFeatureError` for what the template has no place for.
        """
        if not messages:
            raise InvalidRequestError.of("prompt.messages", "is empty; send at least one message")
        request = TemplateInput(tuple(messages), tuple(documents), tuple(tools), template_arguments)
        prefix, generation_prompt = self._split(self._rendering(request))
        self._check_fits(prefix.text)
        return RenderedPrompt(
            self._tokens.encode(prefix, at_start=True),
            self._tokens.encode(generation_prompt, at_start=False),
            messages[-1].role,
        )

    def continue_from(
        self,
        handle: PrefixHandle,
        messages: Sequence[ChatMessage] = (),
        *,
        documents: Sequence[Document] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        template_arguments: Mapping[str, Any] = _NO_ARGUMENTS,
    ) -> RenderedPrompt:
        """Tokens of a handle's conversation and the messages that are new since. The handle's own tokens never change.

        An open assistant's turn is closed first. What the template adds is measured on a stand-in for the handle's last
        turn, so nothing that it writes at the head of a conversation is repeated. Raises as :meth:`render`, and
        :class:`~alora_serve.errors.InvalidRequestError` when new messages would change what is rendered before them.
        """
        if handle.kind is PromptKind.TOKENS:
            if messages or documents or tools:
                raise InvalidRequestError.of("prompt.messages", "cannot follow a handle that was made from token_ids")
            return RenderedPrompt(handle.prefix_tokens, (), "")
        last_role = "assistant" if handle.open_turn else handle.last_role
        if last_role not in ROLES:
            raise InvalidRequestError.of("prompt.handle.last_role", f"is {last_role!r}, not one of {', '.join(ROLES)}")
        request = TemplateInput(tuple(messages), tuple(documents), tuple(tools), template_arguments)
        prefix, closing, generation_prompt = self._continuation(request, last_role)
        self._check_fits(prefix.text)
        if handle.open_turn:
            added = self._tokens.encode(prefix, at_start=False)
            closing_tokens = self._tokens.encode(closing, at_start=False)
            added = added[_overlap(handle.prefix_tokens, closing_tokens, added) :]
        elif not prefix.text.startswith(closing.text):
            raise not_continuable(f"new turns change how a turn of role {last_role} ends")
        else:
            added = self._tokens.encode(prefix.part(len(closing.text)), at_start=False)
        return RenderedPrompt(
            handle.prefix_tokens + added,
            self._tokens.encode(generation_prompt, at_start=False),
            messages[-1].role if messages else last_role,
        )

    def _check_fits(self, text: str) -> None:
        limit, least = self._context_tokens, self._tokens.least_tokens(text)
        if limit is not None and least > limit:
            excess = f"its {least} tokens or more leave no room for an answer: shorten it"
            raise ContextExceededError.beyond("prompt", excess, limit)

    def _rendering(self, request: TemplateInput) -> Rendering:
        check_messages(request.messages)
        self._template.check(request)
        return self._template.render(request, RequestGuard(self._tokens.added_texts))

    def _continuation(self, request: TemplateInput, last_role: str) -> tuple[CutText, CutText, CutText]:
        """What follows the content of a last turn of that role.

        Returns the turn's closing with the new turns, the closing alone, and the generation prompt.
        """
        check_messages(request.messages)
        self._template.check(request)
        guard = RequestGuard(self._tokens.added_texts)
        stand_in = replace(request, messages=self._template.stand_in(last_role, guard.marker))
        try:
            rendering = self._template.render(stand_in, guard)
        except InvalidRequestError as error:
            raise not_continuable(f"it refuses a conversation of one turn of role {last_role}: {error}") from error
        self._check_head(rendering, stand_in, guard)
        closing, generation_prompt = self._split(rendering.after(guard.marker))
        if not request.messages:
            return closing, closing, generation_prompt
        longer = replace(request, messages=stand_in.messages + request.messages)
        prefix, generation_prompt = self._split(self._template.render(longer, guard).after(guard.marker))
        return prefix, closing, generation_prompt

    def _check_head(self, rendering: Rendering, request: TemplateInput, guard: RequestGuard) -> None:
        """Refuse documents and tools that the template writes before the turn where the handle already ends."""
        head = rendering.before(guard.marker)
        without = {"documents": replace(request, documents=()), "tools_json": replace(request, tools=())}
        for field, lesser in without.items():
            if lesser != request and self._template.render(lesser, guard).before(guard.marker) != head:
                raise InvalidRequestError.of(
                    f"prompt.{field}",
                    "stand before the conversation in this chat template and cannot be added to a handle; "
                    "leave them unset, or send all messages instead of the handle",
                )

    def _split(self, rendering: Rendering) -> tuple[CutText, CutText]:
        """The turns and the generation prompt."""
        closed, opened = rendering.closed, rendering.open
        if opened.text.startswith(closed.text):
            return closed, opened.part(len(closed.text))
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(closed.text, opened.text, strict=False)))
        border = self._tokens.border(opened.text, common)
        return opened.part(0, border), opened.part(border)

    def _turn_end(self) -> frozenset[int]:
        try:
            _, closing, _ = self._continuation(TemplateInput(()), "assistant")
        except InvalidRequestError:
            return frozenset()  # no chat template, or one that cannot close a turn: only the configs' ids count
        special = [token for token in self._tokens.encode(closing, at_start=False) if token in self._tokens.special_ids]
        return frozenset(special[:1])


def _overlap(tokens: TokenIds, closing: TokenIds, added: TokenIds) -> int:
    """How much of a turn's closing the tokens already end with."""
    longest = min(len(closing), len(tokens))
    return next((n for n in range(longest, 0, -1) if tokens[-n:] == closing[:n] == added[:n]), 0)

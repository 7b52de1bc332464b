"""From a row to tokens, rendered and placed exactly as the server does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alora_serve.adapters.activation import no_activation, place_invocation
from alora_serve.errors import ConfigError
from alora_serve.intrinsics import ask, parse_definition
from alora_serve.model.chat import ChatTokenizer
from alora_serve.training.definition import answer_text, io_yaml
from alora_serve.training.recipe import Recipe
from alora_serve.training.rows import Row
from alora_serve.types import ChatMessage, Prompt, PromptKind, TokenIds

_ANY_TURN = (ChatMessage("user", "-"),)


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids: ``base_tokens + cue_tokens`` is the prompt.

    Attributes:
        base_tokens: before the invocation, where the adapter is off. Empty for a plain LoRA, which is on everywhere.
        cue_tokens: the rest of the prompt, where it is on.
        answer_tokens: what it shall say, end of turn included. The loss covers these alone.
        target: the row's.
    """

    base_tokens: TokenIds
    cue_tokens: TokenIds
    answer_tokens: TokenIds
    target: str

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.base_tokens) + len(self.cue_tokens)


def common_beginning(sequences: Sequence[TokenIds]) -> TokenIds:
    """The tokens that all ``sequences`` begin with."""
    if not sequences:
        return ()
    first, last = min(sequences), max(sequences)  # in this order, what these two share all share
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


class RowEncoder:
    """Encodes rows for one recipe and one base model's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Raises :class:`ConfigError` when the model's template closes no turn, or the invocation is no token."""
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._chat = ChatTokenizer(tokenizer)
        self._turn_end = self._find_turn_end()
        self._definition = parse_definition(io_yaml(recipe, longest_answer_tokens=1).encode())
        self.invocation_tokens = self._invocation() if recipe.kind == "alora" else ()
        """Empty for a plain LoRA."""

    @property
    def invocation_text(self) -> str:
        """The invocation, special tokens spelt out; empty for a plain LoRA."""
        return self._chat.spell(self.invocation_tokens)

    def encode(self, row: Row) -> Example:
        """Raises :class:`ConfigError` for a target that is no label; the tokenizer's own errors for a bad row."""
        recipe = self._recipe
        asked = Prompt(messages=row.messages, documents=row.documents)
        question = ask(self._definition, asked, {}, template_takes_documents=self._chat.takes_documents).prompt
        prompt = self._chat.render(question.messages, documents=question.documents)
        if recipe.kind == "alora":
            activation = place_invocation(
                kind=PromptKind.CONVERSATION,
                prefix_tokens=prompt.prefix_tokens,
                generation_prompt_tokens=prompt.generation_prompt_tokens,
                invocation_tokens=self.invocation_tokens,
                adapter_name=recipe.name,
                vocabulary_size=self._chat.vocabulary_size,
            )
        else:
            activation = no_activation(prompt.generation_prompt_tokens)
        tokens = prompt.prefix_tokens + activation.suffix_tokens
        start = activation.invocation_start or 0
        return Example(tokens[:start], tokens[start:], self.answer(row.target), row.target)

    def answer(self, target: str) -> TokenIds:
        """Tokens of an answer and its end of turn."""
        text = answer_text(self._recipe, target)
        return (*self._tokens(text, split_special_tokens=True), self._turn_end)

    def _tokens(self, text: str, *, split_special_tokens: bool = False) -> TokenIds:
        encoded: Sequence[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens
        )["input_ids"]
        return tuple(encoded)

    def _find_turn_end(self) -> int:
        ends = self._chat.end_of_sequence_ids  # of the template alone, since no config's were given
        if len(ends) == 1:
            return next(iter(ends))
        if self._tokenizer.eos_token_id is None:
            raise ConfigError("the model's chat template closes no turn and its tokenizer names no end of sequence")
        return int(self._tokenizer.eos_token_id)

    def _invocation(self) -> TokenIds:
        text = self._recipe.invocation
        if text is None:
            tokens = self._chat.render(_ANY_TURN).generation_prompt_tokens
            if not tokens:
                raise ConfigError(
                    "this model's chat template has no generation prompt to invoke by: give an invocation"
                )
            return tokens
        tokens = self._tokens(text)
        if not tokens:
            raise ConfigError(f"invocation={text!r} is no token of this model")
        return tokens

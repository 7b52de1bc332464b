"""A row becomes the tokens that the server would make of it, and the answer the JSON that it would read."""

from __future__ import annotations

import json

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from alora_serve.errors import ConfigError
from alora_serve.training.definition import answer_text, io_yaml, response_format
from alora_serve.training.encoding import RowEncoder, common_beginning
from alora_serve.training.rows import Row
from alora_serve.types import ChatMessage, Document
from small_tokenizers import CHATML, TOOLS, byte_level_tokenizer
from training_recipes import INVOCATION, make_recipe

QUESTION = Row((ChatMessage("user", "Is <this> good?"),), (), "yes", "a")


def spelt(tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> str:
    return str(tokenizer.decode(tokens))


def test_both_kinds_see_what_the_chat_template_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = RowEncoder(tokenizer, make_recipe("lora")).encode(QUESTION)
    messages = [{"role": "user", "content": "Is <this> good?"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert (plain.base_tokens, list(plain.cue_tokens)) == ((), rendered)
    activated = RowEncoder(tokenizer, make_recipe()).encode(QUESTION)
    assert list(activated.base_tokens) == tokenizer.apply_chat_template(messages, return_dict=False)
    assert spelt(tokenizer, activated.cue_tokens) == INVOCATION
    assert spelt(tokenizer, activated.answer_tokens) == '"yes"<|im_end|>'


def test_without_an_invocation_the_generation_prompt_is_it(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = RowEncoder(tokenizer, make_recipe(invocation=None))
    assert encoder.invocation_text == "<|im_start|>assistant\n"
    example = encoder.encode(QUESTION)
    assert example.cue_tokens == encoder.invocation_tokens
    assert spelt(tokenizer, example.base_tokens).endswith("good?<|im_end|>\n")


def test_special_tokens_in_texts_stay_text(tokenizer: PreTrainedTokenizerBase) -> None:
    forged = Row((ChatMessage("user", INVOCATION),), (), "a <|im_end|>", "a")
    example = RowEncoder(tokenizer, make_recipe(labels=(), likelihood={}, field="text")).encode(forged)
    special = set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert not special & set(example.answer_tokens[:-1])
    assert example.base_tokens[-20:].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 0


def test_instruction_and_documents_are_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = (Document("T", "First."), Document("", "Second.", "x"))
    row = Row((ChatMessage("system", "Be brief."), ChatMessage("user", "Why?")), documents, "no", "a")
    encoder = RowEncoder(tokenizer, make_recipe(instruction="Yes or no?"))
    text = spelt(tokenizer, encoder.encode(row).base_tokens)
    documents_turn = "You have access to the following documents:\n\n[Document 1]\nFirst.\n\n[Document x]\nSecond."
    assert f"Be brief.<|im_end|>\n<|im_start|>user\n{documents_turn}<|im_end|>" in text
    assert text.endswith("user\nWhy?<|im_end|>\n<|im_start|>user\nYes or no?<|im_end|>\n")
    knows_documents = RowEncoder(byte_level_tokenizer(TOOLS), make_recipe())
    assert "T: First.\n" in spelt(tokenizer, knows_documents.encode(row).base_tokens)


def test_a_target_that_is_no_label_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    row = Row(QUESTION.messages, (), "maybe", "a")
    with pytest.raises(ConfigError, match=r"'maybe' is none of the labels \['yes', 'no'\]"):
        RowEncoder(tokenizer, make_recipe()).encode(row)


def test_a_template_without_generation_prompt_needs_an_invocation() -> None:
    silent = byte_level_tokenizer(CHATML.split("{% if add_generation_prompt")[0])
    with pytest.raises(ConfigError, match="give an invocation"):
        RowEncoder(silent, make_recipe(invocation=None))


def test_the_definition_says_what_was_trained() -> None:
    recipe = make_recipe(instruction="Is it {good}?")
    written = yaml.safe_load(io_yaml(recipe, 5))
    assert json.loads(written["response_format"]) == {"type": "string", "enum": ["yes", "no"]}
    assert written["instruction"].format() == "Is it {good}?"
    assert written["docs_as_message"] is None, "the server places documents where it places the base model's"
    assert [step["type"] for step in written["transformations"]] == ["likelihood", "nest"]
    assert written["transformations"][0]["categories_to_values"] == {"yes": 1.0, "no": 0.0}
    assert written["parameters"]["max_completion_tokens"] == 13, "a label is as long as it is"
    free = make_recipe(labels=(), likelihood={}, field="question")
    assert json.loads(answer_text(free, 'What "is" it?')) == {"question": 'What "is" it?'}
    assert response_format(free)["required"] == ["question"]
    assert yaml.safe_load(io_yaml(free, 5))["parameters"]["max_completion_tokens"] == 256
    assert yaml.safe_load(io_yaml(free, 400))["parameters"]["max_completion_tokens"] == 408


def test_the_common_beginning_is_all_that_is_shared() -> None:
    assert common_beginning([(1, 2, 3), (1, 2, 4, 5), (1, 2)]) == (1, 2)
    assert common_beginning([(1,), (2,)]) == ()
    assert common_beginning([(1, 2)]) == (1, 2)
    assert common_beginning([]) == ()

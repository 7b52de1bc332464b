"""Training from kept base prefixes is what stock PEFT computes on the whole prompt, and repeats by its seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

INVOCATION = "<|im_start|>question<|im_end|>"
KINDS = ("alora", "lora")


@pytest.fixture
def invocation(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(INVOCATION, add_special_tokens=False))


@pytest.fixture
def build(tiny_model_directory: Path, invocation: list[int]) -> Callable[[str], PeftModel]:
    """A model with an adapter that does something already: PEFT starts with a zero matrix."""

    def make(kind: str) -> PeftModel:
        torch.manual_seed(2)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_directory)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        tokens = invocation if kind == "alora" else None
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, alora_invocation_tokens=tokens)
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture
def examples(training: ModuleType, tokenizer: PreTrainedTokenizerBase, rows_file: Path) -> Callable[[str], list[Any]]:
    """The forty rows as the kind wants them; every third one is a longer conversation."""

    def encode(kind: str) -> list[Any]:
        cue = list(tokenizer.encode(INVOCATION, add_special_tokens=False)) if kind == "alora" else None
        rows = training.read_rows(rows_file)
        for i, row in enumerate(rows):
            row.messages[:0] = [{"role": "user", "content": "Hi " * i}, {"role": "assistant", "content": "Yes"}] * (
                i % 3
            )
        return [training.encode(tokenizer, row, cue) for row in rows]

    return encode


def whole_prompt(example: Any) -> torch.Tensor:
    return torch.tensor([[*example.prefix_tokens, *example.cue_tokens]])


@pytest.mark.parametrize("budget_bytes", [0, 1 << 20, 1 << 30])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_of_a_batch_are_pefts_own_on_each_whole_prompt(
    kind: str,
    budget_bytes: int,
    training: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[str], PeftModel],
    examples: Callable[[str], list[Any]],
) -> None:
    model = build(kind).eval()
    scorer = training.Scorer(model, tokenizer, budget_bytes)
    batch = examples(kind)[:6]
    for _ in range(2):  # the second time from what was kept
        logits = scorer.next_token_logits(batch)
        for example, row in zip(batch, logits, strict=True):
            with torch.no_grad():
                expected = model(input_ids=whole_prompt(example)).logits[0, -1]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    with torch.no_grad(), model.disable_adapter():  # or the comparison above would pass with an adapter that is off
        base = model(input_ids=whole_prompt(batch[0])).logits[0, -1]
    assert (scorer.next_token_logits(batch[:1])[0] - base).abs().max() > 1e-2


@pytest.mark.parametrize(("budget_bytes", "times"), [(1 << 30, 1), (0, 2)])
def test_a_prefix_is_computed_once_if_the_budget_allows(
    budget_bytes: int,
    times: int,
    training: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[str], PeftModel],
    examples: Callable[[str], list[Any]],
) -> None:
    model = build("alora").eval()
    example = examples("alora")[5]
    widths: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    scorer = training.Scorer(model, tokenizer, budget_bytes)
    for _ in range(2):
        scorer.next_token_logits([example])
    assert widths.count(len(example.prefix_tokens)) == times
    assert widths.count(len(example.cue_tokens)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_answers_in_the_whole_prompt(
    kind: str,
    training: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[str], PeftModel],
    examples: Callable[[str], list[Any]],
) -> None:
    model = build(kind)
    batch = examples(kind)[:3]
    torch.autograd.backward(training.Scorer(model, tokenizer, 1 << 30).target_loss(batch))
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = []
    for example in batch:
        answer = [*tokenizer.encode(example.target, add_special_tokens=False), tokenizer.eos_token_id]
        tokens = torch.cat([whole_prompt(example), torch.tensor([answer])], dim=1)
        logits = model(input_ids=tokens).logits[0, -1 - len(answer) : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.autograd.backward(torch.cat(losses).mean())
    assert ours
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_the_same_seed_gives_the_same_weights(
    kind: str,
    training: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[str], PeftModel],
    examples: Callable[[str], list[Any]],
) -> None:
    settings = training.TrainingSettings(epochs=2, batch_size=8, learning_rate=2e-2, weight_decay=0.0, seed=3)
    weights = []
    for _ in range(2):
        scorer = training.Scorer(build(kind), tokenizer, 1 << 30)
        losses: list[float] = []
        epochs: list[int] = []
        steps = training.train(
            scorer, examples(kind), settings, lambda step, total, loss, into=losses: into.append(loss), epochs.append
        )
        assert (steps, len(losses), epochs) == (10, 10, [1, 2])
        assert losses[-1] < losses[0]
        weights.append([p.detach().clone() for p in scorer.model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_plain_twin_sees_what_the_chat_template_renders(
    training: ModuleType, tokenizer: PreTrainedTokenizerBase, invocation: list[int]
) -> None:
    messages = [{"role": "user", "content": "Is <this> good?"}]
    row = training.Row(messages, [], "yes")
    plain = training.encode(tokenizer, row, None)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert [*plain.prefix_tokens, *plain.cue_tokens] == rendered
    activated = training.encode(tokenizer, row, invocation)
    assert (activated.prefix_tokens, activated.cue_tokens) == (plain.prefix_tokens, tuple(invocation))
    asked = training.encode(tokenizer, row, None, "Yes or no?")
    assert tokenizer.decode(asked.prefix_tokens).endswith("user\nYes or no?<|im_end|>\n")


def test_documents_that_the_template_ignores_are_an_error(
    training: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = training.Row([{"role": "user", "content": "Why?"}], [{"title": "", "text": "Because."}], "yes")
    with pytest.raises(ValueError, match="ignores documents"):
        training.encode(tokenizer, row, None)


def test_a_generation_prompt_that_changes_the_conversation_is_an_error(training: ModuleType) -> None:
    from small_tokenizers import ENDS_DIFFERENTLY, byte_level_tokenizer

    row = training.Row([{"role": "user", "content": "Why?"}], [], "yes")
    with pytest.raises(ValueError, match="does not append its generation prompt"):
        training.encode(byte_level_tokenizer(ENDS_DIFFERENTLY), row, None)


@pytest.mark.parametrize("line", ["{", '{"messages": []}', '{"target": "yes"}', "[1]"])
def test_a_bad_line_is_named(line: str, training: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "target": "yes"})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: "):
        training.read_rows(path)


def test_answers_that_begin_alike_cannot_be_scored(
    training: ModuleType, tokenizer: PreTrainedTokenizerBase, build: Callable[[str], PeftModel]
) -> None:
    scorer = training.Scorer(build("lora"), tokenizer, 0)
    with pytest.raises(ValueError, match="do not all begin with different tokens"):
        training.accuracy(scorer, [], ["yes", "yes!"], 4)


def test_accuracy_counts_the_likelier_answer(
    training: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[str], PeftModel],
    examples: Callable[[str], list[Any]],
) -> None:
    scorer = training.Scorer(build("alora").eval(), tokenizer, 1 << 30)
    batch = examples("alora")[:9]
    yes, no = (scorer.encode_target(answer)[0] for answer in ("yes", "no"))
    logits = scorer.next_token_logits(batch)
    expected = sum(
        ("yes" if row[yes] > row[no] else "no") == example.target for row, example in zip(logits, batch, strict=True)
    )
    measured = training.accuracy(scorer, batch, ["no", "yes"], 4)
    assert (measured.correct, measured.total) == (expected, 9)


def test_an_accuracy_shows_its_wilson_interval(training: ModuleType) -> None:
    assert str(training.Accuracy(50, 100)) == "50.0% (40.4% to 59.6%, n = 100)"
    assert str(training.Accuracy(10, 10)) == "100.0% (72.2% to 100.0%, n = 10)"


def test_batches_hold_every_example_once(training: ModuleType) -> None:
    examples = [training.Example((1,) * (i % 7), (2,), str(i)) for i in range(50)]
    for shuffle in (None, random.Random(1)):
        groups = list(training.batches(examples, 4, shuffle))
        assert sorted(int(e.target) for group in groups for e in group) == list(range(50))
        assert max(map(len, groups)) == 4
    first, second = ([e.target for g in training.batches(examples, 4, random.Random(s)) for e in g] for s in (1, 2))
    assert first != second

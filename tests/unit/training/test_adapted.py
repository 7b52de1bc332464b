"""Training from kept base KV is what stock PEFT computes on whole prompts: losses, gradients, probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from alora_serve.training.adapted import AdaptedModel
from alora_serve.training.encoding import Example
from alora_serve.training.prefixes import PrefixOptions
from training_recipes import DEVICES, KINDS

PLENTY = PrefixOptions(torch.float32, 1 << 30)


def whole_prompt(example: Example, device: str | torch.device = "cpu") -> torch.Tensor:
    return torch.tensor([example.base_tokens + example.cue_tokens], device=device)


def plain_loss(model: PeftModel, example: Example) -> torch.Tensor:
    """What anybody would write with PEFT alone: the whole prompt, its invocation found by PEFT."""
    answer = torch.tensor(example.answer_tokens, device=model.device)
    tokens = torch.cat([whole_prompt(example, model.device), answer[None]], dim=1)
    logits = model(input_ids=tokens).logits[0, -1 - len(answer) : -1]
    return torch.nn.functional.cross_entropy(logits, answer, reduction="none")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "options"), [("alora", PLENTY), ("alora", None), ("lora", PLENTY)])
def test_loss_and_gradient_are_those_of_plain_peft(
    device: str,
    kind: str,
    options: PrefixOptions | None,
    build: Callable[[str], PeftModel],
    examples: Callable[[str], list[Example]],
) -> None:
    model = build(kind)
    torch.nn.Module.to(model, device)
    batch = examples(kind)[:7]
    ours = AdaptedModel(model, examples(kind), options)
    for _ in range(2):  # the second time from what was kept
        model.zero_grad()
        loss = ours.answer_loss(batch) / sum(len(example.answer_tokens) for example in batch)
        torch.autograd.backward(loss)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = [plain_loss(model, example) for example in batch]
    expected = torch.cat(losses).mean()
    torch.autograd.backward(expected)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=0)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-2


@pytest.mark.parametrize("budget_bytes", [0, 1 << 14, 1 << 30])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_pefts_own_on_each_whole_prompt(
    kind: str, budget_bytes: int, build: Callable[[str], PeftModel], examples: Callable[[str], list[Example]]
) -> None:
    model = build(kind).eval()
    ours = AdaptedModel(model, examples(kind), PrefixOptions(torch.float32, budget_bytes))
    batch = examples(kind)[:6]
    for _ in range(2):
        logprobs = ours.next_logprobs(batch, ())
        for example, row in zip(batch, logprobs, strict=True):
            with torch.no_grad():
                expected = model(input_ids=whole_prompt(example)).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    with torch.no_grad(), model.disable_adapter():  # or the comparison above would pass with an adapter that is off
        base = model(input_ids=whole_prompt(batch[0])).logits[0, -1].log_softmax(-1)
    assert (logprobs[0] - base).abs().max() > 1e-2


@pytest.mark.parametrize(("budget_bytes", "on_disk", "times"), [(1 << 30, False, 1), (0, False, 3), (0, True, 1)])
def test_a_prefix_is_computed_once_where_there_is_room(
    budget_bytes: int,
    on_disk: bool,
    times: int,
    build: Callable[[str], PeftModel],
    examples: Callable[[str], list[Example]],
    tmp_path: Path,
) -> None:
    model = build("alora").eval()
    all_examples = examples("alora")
    example = all_examples[5]
    widths: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    options = PrefixOptions(torch.float32, budget_bytes, tmp_path / "kept" if on_disk else None, b"model")
    ours = AdaptedModel(model, all_examples, options)
    assert ours.prefixes is not None
    head = ours.prefixes.head_length
    assert head > 10  # the template's system turn
    for _ in range(2):
        ours.next_logprobs([example], ())
    again = AdaptedModel(model, all_examples, options)  # another seed, say
    again.next_logprobs([example], ())
    assert widths.count(len(example.base_tokens) - head) == (times if budget_bytes == 0 else 2)
    assert widths.count(len(example.cue_tokens)) == 3
    assert len(example.base_tokens) not in widths


def test_what_lies_on_disk_is_read_whole_or_computed_again(
    build: Callable[[str], PeftModel], examples: Callable[[str], list[Example]], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    model = build("alora").eval()
    batch = examples("alora")[:4]
    expected = AdaptedModel(model, batch, PLENTY).next_logprobs(batch, ())
    options = PrefixOptions(torch.float32, 0, kept, b"model")
    AdaptedModel(model, batch, options).next_logprobs(batch, ())
    files = sorted(kept.iterdir())
    assert len(files) == 4
    files[0].write_bytes(files[0].read_bytes()[:-10])
    files[1].write_bytes(b"")
    torch.testing.assert_close(AdaptedModel(model, batch, options).next_logprobs(batch, ()), expected, atol=0, rtol=0)
    other = PrefixOptions(torch.float32, 0, kept, b"another model")
    AdaptedModel(model, batch, other).next_logprobs(batch, ())
    assert len(list(kept.iterdir())) == 8


def test_kept_bfloat16_is_close_and_half_as_large(
    build: Callable[[str], PeftModel], examples: Callable[[str], list[Example]]
) -> None:
    model = build("alora").eval()
    batch = examples("alora")[:4]
    exact, rounded = (
        AdaptedModel(model, batch, PrefixOptions(dtype, 1 << 30)) for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(rounded.next_logprobs(batch, ()), exact.next_logprobs(batch, ()), atol=0.1, rtol=0)
    assert exact.prefixes is not None
    assert rounded.prefixes is not None
    base = batch[0].base_tokens
    assert rounded.prefixes.rest(base).nbytes * 2 == exact.prefixes.rest(base).nbytes


def test_dropout_of_the_base_model_does_not_reach_what_is_kept(
    build: Callable[[str], PeftModel], examples: Callable[[str], list[Example]]
) -> None:
    batch = examples("alora")[:3]
    kept = []
    for training in (False, True):
        model = build("alora").train(training)
        for layer in model.get_base_model().model.layers:
            layer.self_attn.attention_dropout = 0.5
        prefixes = AdaptedModel(model, batch, PLENTY).prefixes
        assert prefixes is not None
        kept.append(prefixes.rest(batch[0].base_tokens))
        assert model.training == training
    assert torch.equal(*kept)

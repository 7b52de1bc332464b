from __future__ import annotations

from math import log
from pathlib import Path

import pytest
import torch
from int8_weights import WINDOW_TOKENS, Quality, compare_logits, measure_quality, together
from rich.progress import Progress

from tiny_models import FAMILIES, save_model

TEXT = torch.tensor([0, 1, 0])


def logits_of(*probabilities: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_logits_are_compared_by_the_likeliest_token_by_divergence_and_by_what_the_text_says() -> None:
    exact, rounded = logits_of((0.25, 0.75), (0.5, 0.5)), logits_of((0.75, 0.25), (0.5, 0.5))

    found = compare_logits(exact, rounded, TEXT)

    assert found.tokens == 2
    assert found.same_likeliest == 0.5
    assert found.mean_divergence == pytest.approx((0.75 * log(3) - 0.25 * log(3)) / 2)
    assert found.perplexity == pytest.approx((0.75 * 0.5) ** -0.5)
    assert found.perplexity_rounded == pytest.approx((0.25 * 0.5) ** -0.5)


def test_the_same_logits_differ_in_nothing() -> None:
    found = compare_logits(logits_of((0.2, 0.8), (0.6, 0.4)), logits_of((0.2, 0.8), (0.6, 0.4)), TEXT)

    assert (found.same_likeliest, found.mean_divergence) == (1.0, 0.0)
    assert found.perplexity == found.perplexity_rounded


def test_windows_count_by_their_tokens() -> None:
    found = together([Quality(300, 1.0, 0.0, 10.0, 10.0), Quality(100, 0.6, 0.4, 1000.0, 10.0)])

    assert found.tokens == 400
    assert found.same_likeliest == pytest.approx(0.9)
    assert found.mean_divergence == pytest.approx(0.1)
    assert found.perplexity == pytest.approx(10 ** (0.75 + 3 * 0.25))
    assert found.perplexity_rounded == pytest.approx(10.0)


def test_a_model_is_compared_with_itself_rounded_on_windows_of_the_documentation(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 2
    model = save_model(tmp_path / "tiny-llama", config, sharpness=1.0)

    found = measure_quality(model, "float32", "cpu", WINDOW_TOKENS + 10, Progress(disable=True))

    assert found.tokens == WINDOW_TOKENS + 10
    assert 0 < found.mean_divergence < 0.1
    assert 0.7 < found.same_likeliest <= 1
    assert found.perplexity_rounded == pytest.approx(found.perplexity, rel=0.1)

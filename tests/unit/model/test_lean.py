"""The lean forward answers as transformers' own code does, or does not run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from transformers import AutoConfig

from alora_serve.model import lean
from alora_serve.model.kv_memory import KVSegment, KVSlice
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.model.step import Span, Step
from alora_serve.model.stock import run_stock
from tiny_models import FAMILIES, VOCABULARY, WINDOW, save_model

torch.set_num_threads(1)
TOKENS = tuple(torch.randint(1, VOCABULARY, (3 * WINDOW,), generator=torch.Generator().manual_seed(3)).tolist())


def _load(family: str, directory: Path, dtype: str = "float32") -> BaseModel:
    if family == "mistral":
        sizes = {name: getattr(FAMILIES["llama"](), name) for name in ("hidden_size", "intermediate_size")}
        config = AutoConfig.for_model(
            "mistral",
            vocab_size=VOCABULARY,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=WINDOW,
            **sizes,
        )
    else:
        config = FAMILIES[family]()
    return load_base_model(save_model(directory / f"tiny-{family}", config), dtype=dtype)


def _steps(model: BaseModel) -> list[tuple[Step, KVSegment]]:
    """A prompt in two chunks beside another one, then single tokens."""
    one, two = (KVSegment.allocate(model.layout, len(TOKENS), 0, model.device) for _ in range(2))
    half = len(TOKENS) // 2

    def span(segment: KVSegment, start: int, end: int) -> Span:
        return Span(TOKENS[start:end], start, (), KVSlice(segment, 0, end))

    return [
        (Step([span(one, 0, half)], model.device), one),
        (Step([span(one, half, len(TOKENS) - 1), span(two, 0, 5)], model.device), one),
        (Step([span(one, len(TOKENS) - 1, len(TOKENS)), span(two, 5, 6)], model.device), one),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_logits_and_kv_are_those_of_the_stock_model(family: str, dtype: str, tmp_path: Path) -> None:
    model = _load(family, tmp_path, dtype)
    assert model.lean is not None
    with torch.inference_mode():
        for (lean_step, lean_kv), (stock_step, stock_kv) in zip(_steps(model), _steps(model), strict=True):
            wanted = torch.arange(lean_step.total_rows)
            for kv in (lean_kv, stock_kv):
                kv.data.zero_()
            found = model.lean(lean_step, wanted)
            expected = run_stock(model.module, model.attention, stock_step, wanted)
            assert found is not None
            assert expected is not None
            tolerance = 1e-5 if dtype == "float32" else 2e-2
            assert torch.allclose(found.float(), expected.float(), atol=tolerance * float(expected.abs().max()))
            assert torch.allclose(lean_kv.data.float(), stock_kv.data.float(), rtol=0, atol=tolerance * 30)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama", "qwen2"}))
def test_models_of_another_shape_run_their_own_code(family: str, tmp_path: Path) -> None:
    assert _load(family, tmp_path).lean is None


@pytest.mark.parametrize("broken", ["rotary", "norm", "window"])
def test_a_lean_forward_that_differs_does_not_run(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is called Llama and is not: served all the same, by its own code."""
    norm, rules, build = lean._Norm.__call__, lean.ScoreRules, lean.LeanForward.__init__

    def build_turning_twice_as_far(self: lean.LeanForward, *arguments: object) -> None:
        build(self, *arguments)  # type: ignore[arg-type]
        rotary = self._rotary
        self._rotary = lambda x, positions: rotary(x, 2 * positions)

    if broken == "rotary":
        monkeypatch.setattr(lean.LeanForward, "__init__", build_turning_twice_as_far)
    elif broken == "norm":
        monkeypatch.setattr(lean._Norm, "__call__", lambda self, x: norm(self, x) * 1.001)
    else:
        monkeypatch.setattr(lean, "ScoreRules", lambda scale, cap, _: rules(scale, cap, 2))
    with capture_logs() as logs:
        model = _load("llama", tmp_path)
    assert model.lean is None
    assert any("differs" in entry["event"] for entry in logs)


def test_a_model_that_lacks_a_part_runs_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean._Norm, "of", classmethod(lambda cls, module: cls(module.weight, module.no_such_epsilon)))
    with capture_logs() as logs:
        assert _load("llama", tmp_path).lean is None
    assert any("not built like Llama" in entry["event"] for entry in logs)

"""Fused and packed projections answer what the model's own modules answered, and each module still its own part."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alora_serve.model.projections import Projection, fuse_projections
from alora_serve.model.weights import PlainWeights, WeightLayout, best_layout
from tiny_models import FAMILIES, VOCABULARY

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16]

CPU = torch.device("cpu")
FASTEST = best_layout(torch.float32, CPU)


def _model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("fastest", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_stock_model(family: str, dtype: torch.dtype, fastest: bool) -> None:
    model = _model(family, dtype)
    tokens = torch.arange(4, 40).unsqueeze(0) % VOCABULARY
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits.float()
        fuse_projections(model, best_layout(dtype, CPU) if fastest else "plain")
        found = model(input_ids=tokens).logits.float()
    assert torch.allclose(found, expected, atol=1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        (
            "llama",
            {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",), ("lm_head",)},
        ),
        ("phi3", {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",), ("lm_head",)}),
        ("gpt2", {("c_attn",), ("c_proj",), ("c_fc",), ("lm_head",)}),
    ],
)
def test_siblings_are_fused_where_the_model_has_them(family: str, kinds: set[tuple[str, ...]]) -> None:
    model = _model(family, torch.float32)
    linears = {name for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
    projections = fuse_projections(model, "plain")
    assert {tuple(name.rpartition(".")[2] for name in projection.names) for projection in projections} == kinds
    assert sorted(name for projection in projections for name in projection.names) == sorted(linears)


@pytest.mark.parametrize("layout", ["plain", FASTEST])
def test_weights_are_not_held_twice(layout: WeightLayout) -> None:
    model = _model("llama", torch.float32)
    fuse_projections(model, layout)
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert all(part.weight.is_meta for part in linears)
    assert all((part.out_features, part.in_features) == tuple(part.weight.shape) for part in linears)


def test_a_plain_output_layer_still_is_the_embedding() -> None:
    """Tied, it is not copied."""
    model = _model("gpt2", torch.float32)
    projections = fuse_projections(model, "plain")
    (output,) = (projection for projection in projections if projection.names == ("lm_head",))
    assert isinstance(output.weights, PlainWeights)
    assert output.weights.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_plain_product_has_the_bits_of_the_modules_own() -> None:
    """What ``pack_weights`` off is for: the packed kernels sum in another order."""
    torch.manual_seed(3)
    for rows in (1, 5):
        part = nn.Linear(576, 96).requires_grad_(False)
        x = torch.randn(1, rows, 576)
        expected = part(x)
        Projection(["a"], [part], "plain")
        assert torch.equal(part(x), expected)


def _projected(
    *, bias: bool = True, layout: WeightLayout = "plain"
) -> tuple[list[nn.Linear], Projection, list[torch.Tensor]]:
    torch.manual_seed(3)
    parts = [nn.Linear(8, width, bias=bias).requires_grad_(False) for width in (6, 2, 4)]
    weights = [part.weight.clone() for part in parts]
    return parts, Projection("abc", parts, layout), weights


@pytest.mark.parametrize("layout", ["plain", FASTEST])
@pytest.mark.parametrize("bias", [False, True])
def test_each_module_answers_its_columns(bias: bool, layout: WeightLayout) -> None:
    parts, _, weights = _projected(bias=bias, layout=layout)
    x = torch.randn(1, 5, 8)
    for part, weight in zip(parts, weights, strict=True):
        assert torch.allclose(part(x), nn.functional.linear(x, weight, part.bias), atol=1e-6)


def test_one_product_serves_all_modules_of_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, projection, _ = _projected()
    calls: list[torch.Tensor] = []
    product = Projection.__call__
    monkeypatch.setattr(Projection, "__call__", lambda self, x: (calls.append(x), product(self, x))[1])
    x, y = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    for part in parts:
        part(x)
    assert len(calls) == 1
    for part in parts:
        part(y)
    assert len(calls) == 2
    assert projection._input is None, "an input is not held on to"


def test_another_input_is_another_product() -> None:
    """A model that gave siblings different inputs would still get each its own answer."""
    parts, _, weights = _projected()
    x, y = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    parts[0](x)
    assert torch.allclose(parts[1](y), nn.functional.linear(y, weights[1], parts[1].bias), atol=1e-6)
    assert torch.allclose(parts[2](x), nn.functional.linear(x, weights[2], parts[2].bias), atol=1e-6)


def test_an_adapter_changes_the_product_its_modules_see() -> None:
    parts, projection, _ = _projected()
    x = torch.randn(1, 5, 8)
    plain = [part(x) for part in parts]

    def adapt(rows: torch.Tensor, out: torch.Tensor) -> None:
        assert torch.equal(rows, x[0])
        out[2, projection.columns[1]] += 1.0

    projection.adapt = adapt
    again = x.clone()
    changed = [part(x) for part in parts]
    projection.adapt = None
    assert torch.equal(changed[0], plain[0])
    assert torch.equal(changed[2], plain[2])
    assert torch.allclose(changed[1][0, 2], plain[1][0, 2] + 1.0)
    assert torch.equal(parts[1](again), plain[1])

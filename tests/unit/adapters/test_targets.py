"""Which modules are adapted, by which rank and scaling: equal to what PEFT injects into real models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from alora_serve.adapters import targets
from alora_serve.adapters.config import parse_adapter_config
from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.patterns import Patterns
from alora_serve.adapters.targets import ModuleShape, ResolvedTarget, resolve_targets
from alora_serve.errors import AdapterRefusedError

ALL = ["llama", "phi3", "gemma2", "gpt2"]


def resolve(base: AdapterHost, **fields: Any) -> dict[str, ResolvedTarget]:
    config = parse_adapter_config(json.dumps({"peft_type": "LORA"} | fields).encode())
    return resolve_targets(config, base.module_shapes)


def injected_by_peft(model: PreTrainedModel, **fields: Any) -> dict[str, ResolvedTarget]:
    injected = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields)).base_model.model
    return {
        name: ResolvedTarget(rank=module.r["default"], scaling=module.scaling["default"])
        for name, module in injected.named_modules()
        if isinstance(module, LoraLayer)
    }


LLAMA_CASES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj", "mlp.down_proj", "no_such_proj"]},
    {"target_modules": ["model.layers.1.self_attn.o_proj"]},
    {"target_modules": ["proj"], "_matches_nothing": True},
    {"target_modules": r"model\.layers\.[02]\..*(q|k)_proj"},
    {"target_modules": "q_proj", "_matches_nothing": True},
    {"target_modules": r"model\.layers\.0\.self_attn\.q_pro", "_matches_nothing": True},
    {"target_modules": ".*proj", "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.1"},
    {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj", "o_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": "All-Linear"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks"], "_matches_nothing": True},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["model|x"], "_matches_nothing": True},
    {"target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.up_proj)"},
    {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 4}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"proj": 2}},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"k_proj|v_proj": 2.5, "v_proj": 7}},
    {"target_modules": ["gate_proj"], "use_rslora": True, "alpha_pattern": {"layers.1.mlp.gate_proj": 5}},
    {"target_modules": ["gate_proj"], "use_rslora": True, "rank_pattern": {".*1.*": 3}},
]


@pytest.mark.parametrize("case", LLAMA_CASES, ids=json.dumps)
def test_targets_ranks_and_scalings_are_pefts(
    case: dict[str, Any], llama: AdapterHost, fresh_model: Callable[..., PreTrainedModel]
) -> None:
    matches_nothing = case.get("_matches_nothing", False)
    fields = {"r": 6, "lora_alpha": 11} | {name: value for name, value in case.items() if name[0] != "_"}
    if matches_nothing:
        with pytest.raises(ValueError, match="not found in the base model"):
            injected_by_peft(fresh_model("llama"), **fields)
        with pytest.raises(AdapterRefusedError, match="matches no linear module"):
            resolve(llama, **fields)
    else:
        assert resolve(llama, **fields) == injected_by_peft(fresh_model("llama"), **fields)


NAMES = ["a", "h.1.a", "h.10.ba", "h.1.b.a", "layers.1.q_a", "h.layers.1.q_a"]
PIECES = ["a", "b", "q_", "1", "h", "layers", ".", ".", r"\.", "^", "$", "|", "(", ")", ".*", r"\d", "_"]


@given(st.dictionaries(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.integers(1, 99), max_size=6))
def test_the_key_of_a_module_is_the_one_that_peft_takes(by_key: dict[str, int]) -> None:
    base = AdapterHost(dict.fromkeys(NAMES, ModuleShape(4, 4)), 10, str, lambda text: ())
    try:
        ranks = {name: by_key.get(get_pattern_key(by_key, name), 100) for name in NAMES}
    except re.error:
        with pytest.raises(AdapterRefusedError, match="is not a regular expression"):
            resolve(base, target_modules="all-linear", r=100, rank_pattern=by_key)
        return
    found = resolve(base, target_modules="all-linear", r=100, rank_pattern=by_key, alpha_pattern=by_key, lora_alpha=100)
    assert found == {name: ResolvedTarget(rank, 1.0) for name, rank in ranks.items()}


class Counted(Patterns):
    """Patterns that count what they match."""

    matches = 0

    def match(self, pattern: str, text: str) -> Mapping[str, str | None] | None:
        type(self).matches += 1
        return super().match(pattern, text)


@pytest.mark.parametrize("mark", ["", "^"])
def test_a_rank_for_each_module_of_a_large_model_is_quick_to_find(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layer += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ranks = {f"model.layers.{number}.{name}": 1 + number for number in range(80) for name in layer}
    base = AdapterHost(dict.fromkeys(ranks, ModuleShape(4, 4)), 10, str, lambda text: ())
    monkeypatch.setattr(Counted, "matches", 0)
    monkeypatch.setattr(targets, "Patterns", Counted)
    monkeypatch.setattr(regex, "compile", None)  # which gives away Python's lock whenever it matches
    rank_pattern = {mark + name: rank for name, rank in ranks.items()}
    found = resolve(base, target_modules="all-linear", rank_pattern=rank_pattern)
    assert {name: target.rank for name, target in found.items()} == ranks
    assert Counted.matches < len(ranks) ** 2 / 10


@pytest.mark.parametrize("architecture", ALL)
def test_all_linear_is_every_linear_and_conv1d_but_the_output_layer(
    architecture: str, base_of: Callable[[str], AdapterHost], fresh_model: Callable[..., PreTrainedModel]
) -> None:
    found = resolve(base_of(architecture), target_modules="all-linear", r=2)
    assert found == injected_by_peft(fresh_model(architecture), target_modules="all-linear", r=2)
    assert len(found) == {"llama": 21, "phi3": 12, "gemma2": 21, "gpt2": 12}[architecture]


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("gemma2", {"target_modules": ["o_proj"], "layers_to_transform": [0]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [2], "layers_pattern": ["h"]}),
        ("gpt2", {"target_modules": ["attn.c_proj"], "rank_pattern": {"h.1.attn.c_proj": 3}}),
    ],
)
def test_fused_and_transposed_modules_resolve_as_in_peft(
    architecture: str,
    fields: dict[str, Any],
    base_of: Callable[[str], AdapterHost],
    fresh_model: Callable[..., PreTrainedModel],
) -> None:
    assert resolve(base_of(architecture), **fields) == injected_by_peft(fresh_model(architecture), **fields)


def test_what_peft_saves_for_all_linear_resolves_to_the_same_modules(
    tmp_path: Path, llama: AdapterHost, save_adapter: Callable[..., Path]
) -> None:
    # PEFT replaces the shorthand by a list when it saves.
    raw = (save_adapter(tmp_path / "x", target_modules="all-linear") / "adapter_config.json").read_bytes()
    saved = parse_adapter_config(raw)
    assert isinstance(saved.target_modules, tuple)
    expected = resolve(llama, target_modules="all-linear", r=4, lora_alpha=12)
    assert resolve_targets(saved, llama.module_shapes) == expected


def test_the_layer_is_the_first_number_in_a_name_not_the_expert() -> None:
    shape = ModuleShape(4, 4)
    names = ["model.layers.0.experts.layers.1.w1", "model.layers.1.experts.layers.0.w1"]
    base = AdapterHost(dict.fromkeys(names, shape), 10, str, lambda text: ())
    for fields in [{}, {"layers_pattern": "layers"}]:
        found = resolve(base, target_modules=["w1"], layers_to_transform=[1], **fields)
        assert list(found) == names[1:], "a greedy match would give the other one"


def test_a_module_without_layer_is_left_out_when_layers_are_chosen() -> None:
    base = AdapterHost({"proj.q": ModuleShape(4, 4), "model.layers.1.q": ModuleShape(4, 4)}, 10, str, lambda text: ())
    assert list(resolve(base, target_modules=["q"], layers_to_transform=[1])) == ["model.layers.1.q"]


@pytest.mark.parametrize("target", [["lm_head", "q_proj"], ".*(lm_head|q_proj)"])
def test_the_output_layer_is_refused_by_name(target: object, llama: AdapterHost) -> None:
    with pytest.raises(AdapterRefusedError, match="adapts the output layer 'lm_head'"):
        resolve(llama, target_modules=target)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": "*"},
        {"target_modules": ["q_proj"], "rank_pattern": {"[": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "("},
    ],
    ids=json.dumps,
)
def test_a_broken_regular_expression_refuses_the_adapter(fields: dict[str, Any], llama: AdapterHost) -> None:
    with pytest.raises(AdapterRefusedError, match="is not a regular expression"):
        resolve(llama, **fields)


def test_patterns_that_take_too_long_refuse_the_adapter(llama: AdapterHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "Patterns", partial(Patterns, 0.2))
    slow = r"(?:.|..|...)+(?!.)\d"
    for fields in ({"target_modules": slow}, {"target_modules": ["q_proj"], "rank_pattern": {slow: 2}}):
        with pytest.raises(AdapterRefusedError, match="list the modules by name instead"):
            resolve(llama, **fields)

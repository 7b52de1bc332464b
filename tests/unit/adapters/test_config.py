"""adapter_config.json against the installed PEFT: every field is decided on, and nothing unknown is served."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from alora_serve.adapters.config import ALLOWED, INERT, SERVED, AdapterConfig, parse_adapter_config
from alora_serve.errors import AdapterRefusedError

_NOT_OF_PEFT = {"invocation_string"}


def parse(**fields: Any) -> AdapterConfig:
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | fields
    return parse_adapter_config(json.dumps(fields).encode())


def test_every_field_of_the_installed_lora_config_is_decided_on() -> None:
    # A new PEFT release with a new field fails here: decide whether it is served, inert or refused.
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert (SERVED | INERT.keys() | ALLOWED.keys()) - _NOT_OF_PEFT == fields


def test_no_field_is_decided_on_twice() -> None:
    assert len(SERVED) + len(INERT) + len(ALLOWED) == len(SERVED | INERT.keys() | ALLOWED.keys())


def test_what_peft_saves_by_default_is_served_with_pefts_defaults(tmp_path: Path) -> None:
    saved = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    saved.save_pretrained(str(tmp_path))
    config = parse_adapter_config((tmp_path / "adapter_config.json").read_bytes())
    assert (
        config
        == parse()
        == AdapterConfig(
            kind="lora",
            rank=saved.r,
            alpha=saved.lora_alpha,
            rank_pattern={},
            alpha_pattern={},
            use_rslora=False,
            target_modules=("q_proj",),
            exclude_modules=(),
            layers_to_transform=None,
            layers_pattern=(),
            invocation_tokens=(),
        )
    )


def test_everything_served_is_read(tmp_path: Path) -> None:
    peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=24,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"v_proj": 3},
        use_rslora=True,
        target_modules=["q_proj"],
        exclude_modules="model.layers.0.*",
        layers_to_transform=[1, 2],
        layers_pattern="layers",
        alora_invocation_tokens=[5, 6],
    ).save_pretrained(str(tmp_path))
    config = parse_adapter_config((tmp_path / "adapter_config.json").read_bytes())
    assert config == AdapterConfig(
        kind="alora",
        rank=16,
        alpha=24.0,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"v_proj": 3.0},
        use_rslora=True,
        target_modules=("q_proj",),
        exclude_modules="model.layers.0.*",
        layers_to_transform=(1, 2),
        layers_pattern=("layers",),
        invocation_tokens=(5, 6),
    )


@pytest.mark.parametrize("field", sorted(INERT))
def test_inert_fields_may_hold_anything(field: str) -> None:
    assert parse(**{field: {"any": ["thing"]}}) == parse()


OFF_DEFAULT: dict[str, Any] = {
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "init_lora_weights": "pissa",
    "bias": "all",
    "lora_bias": True,
    "use_dora": True,
    "use_qalora": True,
    "qalora_group_size": 32,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "velora_config": {"scale": 1.0},
    "monteclora_config": {"sample_scaler": 1.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"scale": "stable"},
    "loftq_config": {"loftq_bits": 4},
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [3],
    "target_parameters": ["mlp.experts.down_proj"],
    "layer_replication": [[0, 2], [1, 3]],
    "megatron_config": {"hidden": 1},
    "megatron_core": "my.core",
    "ensure_weight_tying": True,
}


def test_every_restricted_field_has_a_refused_example() -> None:
    assert OFF_DEFAULT.keys() == ALLOWED.keys()


@pytest.mark.parametrize("field", sorted(OFF_DEFAULT))
def test_a_field_off_its_default_refuses_the_adapter_naming_field_and_value(field: str) -> None:
    with pytest.raises(AdapterRefusedError) as refusal:
        parse(**{field: OFF_DEFAULT[field]})
    assert f"adapter_config.json has {field} = {json.dumps(OFF_DEFAULT[field])}: " in str(refusal.value)


def test_ibms_old_format_is_an_alora_of_a_string() -> None:
    config = parse(invocation_string="<|start_of_role|>certainty<|end_of_role|>")
    assert (config.kind, config.invocation_tokens) == ("alora", ())
    assert config.invocation_string == "<|start_of_role|>certainty<|end_of_role|>"


@pytest.mark.parametrize(
    "fields", [{"invocation_string": 3}, {"invocation_string": "x", "alora_invocation_tokens": [1]}]
)
def test_an_invocation_string_is_text_and_stands_alone(fields: dict[str, object]) -> None:
    with pytest.raises(AdapterRefusedError, match="invocation_string"):
        parse(**fields)


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "unheard-of", 1])
def test_an_initialisation_that_may_touch_base_weights_is_refused(init: object) -> None:
    with pytest.raises(AdapterRefusedError, match="init_lora_weights"):
        parse(init_lora_weights=init)


@pytest.mark.parametrize(
    ("init", "changes_base"), [("pissa", True), ("olora", True), ("orthogonal", False), (True, False)]
)
def test_peft_itself_changes_base_weights_for_the_refused_initialisations_alone(
    tmp_path: Path, fresh_model: Callable[..., PreTrainedModel], init: Any, changes_base: bool
) -> None:
    # Served regardless, "pissa" would add its A and B to base weights that PEFT has taken them out of.
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights=init)
    peft.get_peft_model(fresh_model("llama"), config).save_pretrained(str(tmp_path))
    before = fresh_model("llama").model.layers[0].self_attn.q_proj.weight
    loaded = peft.PeftModel.from_pretrained(fresh_model("llama"), str(tmp_path))
    after = loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(before, after) is not changes_base


def test_a_field_that_no_known_peft_has_refuses_unless_empty() -> None:
    assert parse(use_future=False, future_config=None, future_list=[], future_name="") == parse()
    with pytest.raises(AdapterRefusedError, match="use_future = true: this field is not known"):
        parse(use_future=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", True),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("alpha_pattern", {"q_proj": -(10**400)}),
        ("r", 2**31),
        ("layers_to_transform", [10**400]),
        ("alora_invocation_tokens", [2**31]),
        ("invocation_string", "\ud800"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": None}),
        ("use_rslora", "yes"),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("exclude_modules", [None]),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", [-1]),
        ("layers_pattern", "layers"),
        ("alora_invocation_tokens", [1, -2]),
        ("alora_invocation_tokens", [True]),
        ("alora_invocation_tokens", "<|check|>"),
    ],
)
def test_a_value_of_the_wrong_type_refuses_the_adapter_naming_it(field: str, value: object) -> None:
    with pytest.raises(AdapterRefusedError, match=f"has {field} = "):
        parse(**{field: value})


@pytest.mark.parametrize("fields", [{"layers_to_transform": [0]}, {"layers_to_transform": 0, "layers_pattern": "h"}])
def test_layers_cannot_be_chosen_for_a_regular_expression_as_in_peft(fields: dict[str, Any]) -> None:
    with pytest.raises(AdapterRefusedError, match="layers_to_transform"):
        parse(target_modules=".*q_proj", **fields)
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft.LoraConfig(target_modules=".*q_proj", **fields)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[]", b'"LORA"', b"{}", b"[" * 10_000])
def test_what_is_no_peft_config_is_refused(raw: bytes) -> None:
    with pytest.raises(AdapterRefusedError, match=r"^adapter_config\.json"):
        parse_adapter_config(raw)


def test_a_config_that_names_no_peft_type_is_refused() -> None:
    with pytest.raises(AdapterRefusedError, match="peft_type = null"):
        parse_adapter_config(b'{"target_modules": ["q_proj"]}')


def test_an_empty_invocation_is_a_plain_lora_as_in_peft(fresh_model: Callable[..., PreTrainedModel]) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[])
    layer = peft.get_peft_model(fresh_model("llama"), config).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_variant == {}
    assert parse(alora_invocation_tokens=[]).kind == "lora"
    assert parse(alora_invocation_tokens=[7]).kind == "alora"


def test_serving_adapters_never_imports_peft() -> None:
    # PEFT takes seconds to import and is the reference, not a part.
    script = "import sys, alora_serve.adapters.registry, alora_serve.adapters.modules; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alora_serve.cli.peft_check import check
from tiny_models import FAMILIES, peft_generate, save_adapter, save_model

PROMPT = (5, 60, 61, 62, 7, 90, 91, 92, 93, 94, 95, 12, 13)
INVOCATION = [95, 12]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), FAMILIES["llama"]())


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return save_adapter(model, directory, seed=1, alora_invocation_tokens=INVOCATION, target_modules=targets)


def request(model: Path, adapter: Path | None, tokens: tuple[int, ...], dtype: str = "float32") -> dict[str, object]:
    case = {"name": "case", "adapter": adapter and str(adapter), "prompt": list(PROMPT), "tokens": list(tokens)}
    return {"model": str(model), "dtype": dtype, "cases": [case]}


def test_tokens_of_the_adapter_are_equal_and_those_of_the_base_model_are_not(model: Path, adapter: Path) -> None:
    adapted, base = (peft_generate(model, one, PROMPT, 6).tokens for one in (adapter, None))
    assert adapted != base
    (right,) = check(request(model, adapter, adapted))["cases"]
    assert right == {"name": "case", "equal": True, "peft_tokens": list(adapted)}
    (wrong,) = check(request(model, adapter, base))["cases"]
    assert wrong == {"name": "case", "equal": False, "peft_tokens": list(adapted)}
    (plain,) = check(request(model, None, base))["cases"]
    assert plain["equal"]


def test_in_bfloat16_a_token_is_wrong_only_when_its_logit_is_clearly_below_the_best(model: Path, adapter: Path) -> None:
    adapted, base = (peft_generate(model, one, PROMPT, 6).tokens for one in (adapter, None))
    (right,) = check(request(model, adapter, adapted, "bfloat16"))["cases"]
    assert right == {"name": "case", "equal": True, "largest_gap": pytest.approx(0.0, abs=1e-3)}
    (wrong,) = check(request(model, adapter, base, "bfloat16"))["cases"]
    assert not wrong["equal"]
    assert wrong["largest_gap"] > 1.0

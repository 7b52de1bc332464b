"""The folder that mellea reads: an index that names what is there, and the definitions as they are served."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(examples_directory: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(examples_directory))
    return importlib.import_module("mellea_layout")


def test_every_intrinsic_is_in_the_index_with_its_kind_and_its_definition(
    script: ModuleType, examples_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = examples_directory / "intrinsics"
    for _ in range(2):  # what is there already is replaced
        script.main(["--adapters", str(shipped), "--output", str(tmp_path / "mellea")])
    entries = json.loads((tmp_path / "mellea" / "adapter_index.json").read_text())["adapters"]
    assert [entry["adapter_name"] for entry in entries] == sorted(path.name for path in shipped.iterdir())
    for entry in entries:
        name = entry["adapter_name"]
        assert entry["technology"] == ("lora" if name.endswith("-lora") else "alora")
        definition = tmp_path / "mellea" / entry["io_config"]
        assert definition.read_bytes() == (shipped / name / "io.yaml").read_bytes()
    assert "jailbreak, jailbreak-lora, query_rewrite" in capsys.readouterr().out


def test_adapters_of_the_old_format_are_aloras_and_those_without_a_definition_are_left_out(
    script: ModuleType, tmp_path: Path
) -> None:
    for name, config in (("old", {"invocation_string": "<|x|>"}), ("plain", {}), ("undefined", {})):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        saved = {"peft_type": "LORA", "target_modules": ["q_proj"], **config}
        (tmp_path / "adapters" / name / "adapter_config.json").write_text(json.dumps(saved))
        if name != "undefined":
            (tmp_path / "adapters" / name / "io.yaml").write_text("model: ~")
    assert script.write_layout(tmp_path / "adapters", tmp_path / "out") == ["old", "plain"]
    entries = json.loads((tmp_path / "out" / "adapter_index.json").read_text())["adapters"]
    assert [entry["technology"] for entry in entries] == ["alora", "lora"]
    with pytest.raises(SystemExit, match=r"no directory of .*empty holds an io\.yaml"):
        script.write_layout(tmp_path / "empty", tmp_path / "out")

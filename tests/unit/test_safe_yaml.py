"""Whatever YAML holds is a plain value, or one kind of error that says where."""

from __future__ import annotations

import pytest
import yaml

from alora_serve.safe_yaml import FastLoader, Loader, load_yaml

EITHER = pytest.mark.parametrize("loader", [Loader, FastLoader])


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_yaml_is_read_in_c_unless_otherwise_told() -> None:
    assert issubclass(FastLoader, yaml.CSafeLoader)
    with pytest.raises(yaml.YAMLError, match="maximum nesting depth"):  # of libyaml: in Python, the stack ends first
        load_yaml("[" * 5_000)


@EITHER
def test_plain_values_are_read(loader: type[Loader | FastLoader]) -> None:
    for raw in ("a: [1, x, 2.5, ~]", b"a: [1, x, 2.5, ~]"):
        assert load_yaml(raw, loader) == {"a": [1, "x", 2.5, None]}


@EITHER
@pytest.mark.parametrize(
    "value",
    ["2027-02-30", "2027-02-30T00:00:00Z", "!!timestamp soon", "!!bool maybe", "!!int ''", "!!float ''", "!!int x"],
)
def test_a_value_that_is_none_of_its_kind_is_found_by_its_line(value: str, loader: type[Loader | FastLoader]) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as refused:
        load_yaml(f"fine: 1\nthis: {value}\n", loader)
    assert refused.value.problem_mark is not None
    assert refused.value.problem_mark.line == 1


@EITHER
@pytest.mark.parametrize("raw", ["[" * 5_000, '"\\UFFFFFFFF"', b"\xff\xfe\x00", "a: [", "!!python/name:os.system x"])
def test_what_is_no_yaml_is_refused_by_one_error(raw: str | bytes, loader: type[Loader | FastLoader]) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(raw, loader)

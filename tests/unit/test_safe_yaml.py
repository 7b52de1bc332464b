"""Whatever YAML holds is a plain value, or one kind of error that says where."""

from __future__ import annotations

import pytest
import yaml

from alora_serve.safe_yaml import load_yaml


def test_plain_values_are_read() -> None:
    assert load_yaml("a: [1, x, 2.5, ~]") == load_yaml(b"a: [1, x, 2.5, ~]") == {"a": [1, "x", 2.5, None]}


@pytest.mark.parametrize(
    "value",
    ["2027-02-30", "2027-02-30T00:00:00Z", "!!timestamp soon", "!!bool maybe", "!!int ''", "!!float ''", "!!int x"],
)
def test_a_value_that_is_none_of_its_kind_is_found_by_its_line(value: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as refused:
        load_yaml(f"fine: 1\nthis: {value}\n")
    assert refused.value.problem_mark is not None
    assert refused.value.problem_mark.line == 1


@pytest.mark.parametrize("raw", ["[" * 5_000, '"\\UFFFFFFFF"', b"\xff\xfe\x00", "a: [", "!!python/name:os.system x"])
def test_what_is_no_yaml_is_refused_by_one_error(raw: str | bytes) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(raw)

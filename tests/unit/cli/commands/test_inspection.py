"""What people see of an adapter."""

from __future__ import annotations

from dataclasses import replace

from alora_serve.adapters.catalog import refused_info
from alora_serve.cli.commands.inspection import _described
from alora_serve.types import AdapterDigest, AdapterInfo

GUARD = AdapterInfo(
    name="guard",
    digest=AdapterDigest("0123456789abcdef"),
    kind="alora",
    rank=8,
    target_modules=("q_proj", "v_proj"),
    invocation_tokens=(1, 2),
    invocation_text="<|im_start|>guard<|im_end|>",
    size_bytes=64,
    resident=True,
)


def test_an_adapter_is_described_by_what_tells_it_from_others() -> None:
    assert [line.plain for line in _described(GUARD)] == [
        "guard  alora, rank 8, in memory, digest 0123456789ab",
        "    invoked by '<|im_start|>guard<|im_end|>'",
        "    adapts q_proj, v_proj",
    ]


def test_whether_an_adapter_is_in_memory_is_not_denied_to_those_who_may_not_know() -> None:
    [said, *_] = _described(replace(GUARD, resident=False))
    assert said.plain == "guard  alora, rank 8, digest 0123456789ab"


def test_a_refused_adapter_shows_why_and_nothing_that_is_not_known() -> None:
    assert [line.plain for line in _described(refused_info("dora", "DoRA is not served"))] == [
        "dora  refused",
        "    DoRA is not served",
    ]

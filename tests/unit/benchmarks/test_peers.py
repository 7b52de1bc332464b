"""What peers are run with, and what is read from them."""

from __future__ import annotations

import pytest
from systems.llama import step_seconds
from systems.peft_settings import ALORA, AS_IN_TABLES, LORA, PeftSettings, trials

MALLOC = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}


def test_llama_servers_clock_starts_at_the_first_token() -> None:
    assert step_seconds({"predicted_ms": 310.0, "predicted_n": 32}) == pytest.approx(0.01)
    assert step_seconds({"predicted_ms": 0.001, "predicted_n": 1}) < 1e-5
    assert step_seconds({}) == 0


def test_pefts_threads_wait_as_openmp_has_them_wait_unless_they_are_told_to_sleep() -> None:
    given = {"PATH": "/bin", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}

    spinning = PeftSettings().environment(given)
    sleeping = PeftSettings(threads_sleep=True).environment({"PATH": "/bin", "OMP_WAIT_POLICY": "active"})

    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & spinning.keys()
    assert sleeping["OMP_WAIT_POLICY"] == "passive"
    assert spinning["PATH"] == sleeping["PATH"] == "/bin"
    assert int(spinning["OMP_NUM_THREADS"]) >= 1


def test_pefts_allocator_keeps_memory_unless_it_is_not_to() -> None:
    assert PeftSettings().environment({}).keys() >= MALLOC
    assert not MALLOC & PeftSettings(keeps_memory=False).environment(dict.fromkeys(MALLOC, "1")).keys()


@pytest.mark.parametrize(
    ("settings", "prompt_tokens", "rows"),
    [
        (PeftSettings(batched=False), 512, 1),
        (PeftSettings(batched=True, batch_tokens=65536), 2048, 32),
        (PeftSettings(batched=True, batch_tokens=65536), 6144, 10),
        (PeftSettings(batched=True, batch_tokens=65536), 100_000, 1),
    ],
)
def test_a_batch_holds_what_memory_allows(settings: PeftSettings, prompt_tokens: int, rows: int) -> None:
    assert settings.batch_rows(prompt_tokens) == rows


@pytest.mark.parametrize("best", [LORA, ALORA])
def test_what_is_tried_of_peft_is_one_change_of_what_the_tables_have(best: PeftSettings) -> None:
    found = trials(best)

    assert found[AS_IN_TABLES] == best
    assert len(set(found.values())) == len(found) == 4

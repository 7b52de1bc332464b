"""The registry over real adapter directories: listing, lazy loading, changes on disk, resumes, and many threads."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from alora_serve.adapters import catalog, registry
from alora_serve.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.adapters.residency import AdapterEvent
from alora_serve.errors import AdapterNotFoundError, AdapterRefusedError, ConfigError, IntrinsicUndefinedError
from alora_serve.types import AdapterDigest, AdapterInfo

SaveAdapter = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, save_adapter: SaveAdapter) -> Path:
    root = tmp_path / "adapters"
    save_adapter(root / "certainty", alora_invocation_tokens=[40, 41])
    save_adapter(root / "jailbreak", seed=2)
    return root


class Opened:
    """A registry over ``roots`` and the events it reported."""

    def __init__(self, *roots: Path, base: AdapterHost, **settings: Any) -> None:
        self.events: list[AdapterEvent] = []
        settings = {"max_resident_bytes": 1 << 20, "on_event": self.events.append} | settings
        self.registry = AdapterRegistry(roots, base=base, **settings)

    def info(self, name: str) -> AdapterInfo:
        [info] = [info for info in self.registry.list_adapters() if info.name == name]
        return info

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture
def opened(root: Path, llama: AdapterHost) -> Opened:
    return Opened(root, base=llama)


def test_everything_is_listed_before_anything_is_loaded(opened: Opened) -> None:
    certainty, jailbreak = opened.registry.list_adapters()
    assert (certainty.name, certainty.kind, certainty.invocation_tokens) == ("certainty", "alora", (40, 41))
    assert (jailbreak.name, jailbreak.kind, jailbreak.resident) == ("jailbreak", "lora", False)
    assert certainty.digest != jailbreak.digest
    assert opened.events == []
    assert opened.registry.resident_bytes() == 0


def test_what_is_not_in_memory_is_listed_without_being_made_anew(opened: Opened) -> None:
    with opened.registry.acquire("certainty"):
        (_, first), (_, again) = opened.registry.list_adapters(), opened.registry.list_adapters()
    assert first is again


def test_the_first_use_loads_and_the_second_hits(opened: Opened) -> None:
    with opened.registry.acquire("certainty") as first, opened.registry.acquire("certainty") as second:
        assert first.adapter is second.adapter
        assert first.adapter.digest == opened.info("certainty").digest
    assert opened.kinds() == ["load", "hit"]
    assert opened.events[0].seconds > 0
    assert opened.info("certainty").resident
    assert not opened.info("jailbreak").resident
    assert opened.registry.resident_bytes() == opened.info("certainty").size_bytes


def test_an_unknown_name_is_answered_with_the_nearest(opened: Opened) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"'certanty'; did you mean 'certainty'\?"):
        opened.registry.acquire("certanty")
    with pytest.raises(AdapterNotFoundError, match=r"no adapter is named '\.\./certainty'"):
        opened.registry.acquire("../certainty")
    with pytest.raises(AdapterNotFoundError, match=r"no adapter is named 'zzz'$"):
        opened.registry.unload("zzz")


def test_refused_adapters_are_listed_with_their_problem_and_refused_with_it(
    root: Path, llama: AdapterHost, save_adapter: SaveAdapter
) -> None:
    save_adapter(root / "dora", use_dora=True)
    opened = Opened(root, base=llama)
    problem = opened.info("dora").problem
    assert problem == "adapter_config.json has use_dora = true: DoRA is not served"
    assert opened.events == [AdapterEvent("refuse", "dora", problem=problem)]
    assert opened.info("certainty").problem == ""
    with pytest.raises(AdapterRefusedError) as refused:
        opened.registry.acquire("dora")
    assert str(refused.value) == f"adapter 'dora' cannot be served: {problem}"


def test_what_only_loading_can_see_becomes_the_problem(
    root: Path, opened: Opened, save_adapter: SaveAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = root / "certainty" / WEIGHTS_NAME
    content = bytearray(weights.read_bytes())
    content[-4:] = torch.tensor([float("nan")]).numpy().tobytes()
    weights.write_bytes(content)
    with pytest.raises(AdapterRefusedError, match="holds infinities or NaNs"):
        opened.registry.acquire("certainty")
    assert opened.kinds() == ["refuse"]
    assert "holds infinities or NaNs" in opened.info("certainty").problem
    # Asked and looked at again, it is not read again, and nothing more is told.
    with monkeypatch.context() as patched:
        patched.setattr(registry, "load_adapter", None)
        for _ in range(2):
            opened.registry.refresh()
            assert "holds infinities or NaNs" in opened.info("certainty").problem
            with pytest.raises(AdapterRefusedError, match="holds infinities or NaNs"):
                opened.registry.acquire("certainty")
    assert opened.kinds() == ["refuse"]
    save_adapter(root / "certainty", seed=3)
    opened.registry.refresh()
    assert opened.info("certainty").problem == ""


def test_a_refused_adapter_is_served_once_it_is_repaired(root: Path, opened: Opened, save_adapter: SaveAdapter) -> None:
    config = (root / "certainty" / CONFIG_NAME).read_text()
    (root / "certainty" / CONFIG_NAME).write_text("{")
    with pytest.raises(AdapterRefusedError, match="not JSON"):
        opened.registry.acquire("certainty")
    (root / "certainty" / CONFIG_NAME).write_text(config)
    opened.registry.acquire("certainty").release()
    assert opened.info("certainty").problem == ""


def test_a_refusal_is_told_once_for_each_problem_and_for_each_change_of_files(root: Path, opened: Opened) -> None:
    weights = root / "jailbreak" / WEIGHTS_NAME
    whole = weights.read_bytes()

    def told() -> list[AdapterEvent]:
        """Of two looks at the roots, each with a request behind it."""
        opened.events.clear()
        for _ in range(2):
            opened.registry.refresh()
            with pytest.raises(AdapterRefusedError):
                opened.registry.acquire("jailbreak")
        return list(opened.events)

    weights.write_bytes(whole[:4])
    [truncated] = told()
    assert truncated == AdapterEvent("refuse", "jailbreak", problem=opened.info("jailbreak").problem)
    os.utime(weights, ns=(0, 0))  # copied anew, and no better
    assert told() == [truncated]
    weights.unlink()
    [missing] = told()
    assert missing.problem == opened.info("jailbreak").problem != truncated.problem
    weights.write_bytes(whole[:4])
    assert told() == [truncated]


def test_an_adapter_that_loses_a_file_is_refused_until_it_is_back(root: Path, opened: Opened) -> None:
    opened.registry.load("certainty")
    weights = root / "certainty" / WEIGHTS_NAME
    weights.rename(root / "kept")
    with pytest.raises(AdapterRefusedError, match=f"cannot read {WEIGHTS_NAME}"):
        opened.registry.acquire("certainty")
    (root / "kept").rename(weights)
    opened.registry.acquire("certainty").release()
    assert opened.info("certainty").problem == ""


def test_of_two_adapters_of_one_name_the_first_root_counts_and_the_other_is_listed(
    root: Path, tmp_path: Path, llama: AdapterHost, save_adapter: SaveAdapter
) -> None:
    save_adapter(tmp_path / "more" / "certainty", seed=9)
    save_adapter(tmp_path / "more" / "support", seed=9)
    opened = Opened(root, tmp_path / "more", base=llama)
    served, hidden = (info for info in opened.registry.list_adapters() if info.name == "certainty")
    assert (served.problem, served.kind) == ("", "alora")
    assert hidden.problem == f"{tmp_path / 'more' / 'certainty'} is hidden by {root / 'certainty'}, of the same name"
    assert opened.events == [AdapterEvent("refuse", "certainty", problem=hidden.problem)]
    opened.registry.refresh()
    assert len(opened.events) == 1, "told once"
    assert opened.info("support").problem == ""
    with opened.registry.acquire("certainty") as lease:
        assert lease.adapter.digest == served.digest


def test_only_folders_with_a_config_are_adapters(root: Path, llama: AdapterHost) -> None:
    (root / "notes").mkdir()
    (root / "README.md").write_text("hello")
    shutil.copytree(root / "certainty", root / ".cache")
    names = [info.name for info in Opened(root, base=llama).registry.list_adapters()]
    assert names == ["certainty", "jailbreak"]


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_root_that_is_no_directory_stops_the_start(tmp_path: Path, llama: AdapterHost, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"adapter root .*{name} cannot be listed"):
        Opened(tmp_path / name, base=llama)


def test_a_root_that_vanishes_leaves_the_catalog_as_it_was(root: Path, opened: Opened) -> None:
    root.rename(root.with_name("away"))
    with pytest.raises(ConfigError):
        opened.registry.refresh()
    assert len(opened.registry.list_adapters()) == 2
    with pytest.raises(AdapterNotFoundError):
        opened.registry.acquire("certainty")


def test_a_small_budget_keeps_what_was_used_last(root: Path, llama: AdapterHost) -> None:
    size = Opened(root, base=llama).info("certainty").size_bytes
    opened = Opened(root, base=llama, max_resident_bytes=size)
    opened.registry.acquire("certainty").release()
    opened.registry.acquire("jailbreak").release()
    assert not opened.info("certainty").resident
    assert opened.info("jailbreak").resident
    assert opened.kinds() == ["load", "evict", "load"]


def test_room_is_made_before_reading(root: Path, llama: AdapterHost, monkeypatch: pytest.MonkeyPatch) -> None:
    real, held = registry.load_adapter, []

    def watched(files: Any, **kwargs: Any) -> Any:
        held.append(opened.registry.resident_bytes())
        return real(files, **kwargs)

    opened = Opened(root, base=llama, max_resident_bytes=10_000)
    monkeypatch.setattr(registry, "load_adapter", watched)
    opened.registry.acquire("certainty").release()
    opened.registry.acquire("jailbreak").release()
    assert held == [0, 0], "else the old and the new weights stand in memory together"


def test_a_large_weights_file_is_refused(root: Path, llama: AdapterHost) -> None:
    assert "more than 100" in Opened(root, base=llama, max_weights_bytes=100).info("certainty").problem


def test_load_finds_new_adapters_and_unload_drops_them(root: Path, opened: Opened, save_adapter: SaveAdapter) -> None:
    save_adapter(root / "support", seed=5)
    with pytest.raises(AdapterNotFoundError):
        opened.registry.acquire("support")
    assert opened.registry.load("support").resident
    assert opened.info("support").resident
    assert opened.registry.unload("support")
    assert not opened.info("support").resident
    assert not opened.registry.unload("support"), "it was out of memory already"
    assert opened.kinds() == ["load", "drop"]


def test_unloading_leaves_running_sequences_their_weights(opened: Opened) -> None:
    with opened.registry.acquire("certainty") as lease:
        assert opened.registry.unload("certainty")
        assert opened.info("certainty").resident
        assert lease.adapter.pairs
    assert not opened.info("certainty").resident


def test_changed_weights_are_a_new_adapter_and_running_sequences_keep_the_old(
    root: Path, opened: Opened, save_adapter: SaveAdapter
) -> None:
    old = opened.registry.acquire("certainty")
    save_adapter(root / "certainty", seed=77, alora_invocation_tokens=[40, 41])
    new = opened.registry.acquire("certainty")
    assert opened.registry.resident() == {("certainty", old.adapter.digest), ("certainty", new.adapter.digest)}
    module = "model.layers.0.self_attn.q_proj"
    assert old.adapter.digest != new.adapter.digest == opened.info("certainty").digest
    assert not torch.equal(old.adapter.pairs[module].a, new.adapter.pairs[module].a)
    old.release()
    assert opened.kinds() == ["load", "load", "drop"]
    assert opened.registry.resident_bytes() == new.adapter.size_bytes


def test_a_changed_config_alone_is_a_new_adapter(root: Path, opened: Opened, edit_config: Callable[..., None]) -> None:
    with opened.registry.acquire("certainty") as old:
        edit_config(root / "certainty", lora_alpha=3)
        with opened.registry.acquire("certainty") as new:
            assert old.adapter.digest != new.adapter.digest
            scalings = [lease.adapter.pairs["model.layers.0.self_attn.q_proj"].scaling for lease in (old, new)]
            assert scalings == [3.0, 0.75]


def test_files_that_were_only_touched_stay_one_adapter(root: Path, opened: Opened) -> None:
    with opened.registry.acquire("certainty") as old:
        os.utime(root / "certainty" / WEIGHTS_NAME, ns=(1, 1))
        with opened.registry.acquire("certainty") as new:
            assert new.adapter is old.adapter
    assert opened.registry.resident_bytes() == old.adapter.size_bytes


def test_refresh_lists_the_new_digest_without_loading_it(root: Path, opened: Opened, save_adapter: SaveAdapter) -> None:
    before = opened.registry.load("certainty")
    save_adapter(root / "certainty", seed=77)
    opened.registry.refresh()
    listed = opened.info("certainty")
    assert listed.digest != before.digest
    assert (listed.kind, listed.resident) == ("lora", False)


def test_refresh_reads_nothing_that_did_not_change(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened.registry.list_adapters()
    monkeypatch.setattr(registry, "inspect_adapter", None)
    opened.registry.refresh()
    assert opened.registry.list_adapters() == before


def test_a_vanished_adapter_is_not_found_and_leaves_memory(root: Path, opened: Opened) -> None:
    lease = opened.registry.acquire("certainty")
    shutil.rmtree(root / "certainty")
    with pytest.raises(AdapterNotFoundError):
        opened.registry.acquire("certainty")
    opened.registry.refresh()
    assert [info.name for info in opened.registry.list_adapters()] == ["jailbreak"]
    lease.release()
    assert opened.registry.resident_bytes() == 0


def test_a_resume_gets_its_version_from_memory_even_when_the_files_have_changed(
    root: Path, opened: Opened, save_adapter: SaveAdapter
) -> None:
    lease = opened.registry.acquire("certainty")
    save_adapter(root / "certainty", seed=77)
    with opened.registry.acquire("certainty", digest=lease.adapter.digest) as resumed:
        assert resumed.adapter is lease.adapter


def test_a_resume_loads_its_version_when_the_files_still_hold_it(opened: Opened) -> None:
    digest = opened.info("certainty").digest
    with opened.registry.acquire("certainty", digest=digest) as resumed:
        assert resumed.adapter.digest == digest


def test_a_resume_under_another_digest_is_refused_and_holds_nothing(opened: Opened) -> None:
    with pytest.raises(AdapterRefusedError, match=r"'certainty' is now .{12}, but the stream began with 0000"):
        opened.registry.acquire("certainty", digest=AdapterDigest("0" * 64))
    opened.registry.unload("certainty")
    assert opened.registry.resident_bytes() == 0, "a lease that was not given back would keep it"


def test_files_that_change_while_they_are_read_are_read_again(
    root: Path, opened: Opened, save_adapter: SaveAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = registry.load_adapter, []

    def load_during_a_write(files: Any, **kwargs: Any) -> Any:
        loaded = real(files, **kwargs)
        reads.append(loaded.digest)
        if len(reads) == 1:
            save_adapter(root / "certainty", seed=88)
        return loaded

    monkeypatch.setattr(registry, "load_adapter", load_during_a_write)
    with opened.registry.acquire("certainty") as lease:
        assert len(reads) == 2
        assert lease.adapter.digest == reads[1] != reads[0]


def test_files_that_never_stand_still_are_refused(root: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.load_adapter

    def load_during_a_write(files: Any, **kwargs: Any) -> Any:
        loaded = real(files, **kwargs)
        stat = (root / "certainty" / CONFIG_NAME).stat()
        os.utime(root / "certainty" / CONFIG_NAME, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        return loaded

    monkeypatch.setattr(registry, "load_adapter", load_during_a_write)
    with pytest.raises(AdapterRefusedError, match="its files keep changing"):
        opened.registry.acquire("certainty")
    monkeypatch.undo()
    opened.registry.acquire("certainty").release()


def test_a_file_that_cannot_be_read_refuses_the_adapter(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(registry, "load_adapter", fail)
    with pytest.raises(AdapterRefusedError, match="its files cannot be read: Input/output error"):
        opened.registry.acquire("certainty")
    monkeypatch.undo()
    opened.registry.refresh()
    opened.registry.acquire("certainty").release()


def test_an_unforeseen_failure_does_not_pass_the_old_version_for_the_new_files(
    root: Path, opened: Opened, save_adapter: SaveAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    old = opened.registry.acquire("certainty").adapter
    save_adapter(root / "certainty", seed=77)
    monkeypatch.setattr(registry, "load_adapter", fail)
    for _ in range(2):
        with pytest.raises(MemoryError):
            opened.registry.acquire("certainty")
    monkeypatch.undo()
    assert opened.registry.acquire("certainty").adapter.digest != old.digest


def test_a_lack_of_memory_fails_the_request_and_refuses_no_adapter(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors.torch, "load", lambda content: torch.empty(1 << 60))
    with pytest.raises(MemoryError):
        opened.registry.acquire("certainty")
    assert (opened.info("certainty").problem, opened.events) == ("", [])
    monkeypatch.undo()
    opened.registry.acquire("certainty").release()


def test_concurrent_first_uses_read_once(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    real, reads, waiting = registry.load_adapter, [], threading.Barrier(8)

    def counted(files: Any, **kwargs: Any) -> Any:
        reads.append(kwargs["name"])
        time.sleep(0.1)  # long enough for the others to come; they have no business here
        return real(files, **kwargs)

    def acquire(_: int) -> object:
        waiting.wait()
        return opened.registry.acquire("certainty").adapter

    monkeypatch.setattr(registry, "load_adapter", counted)
    with ThreadPoolExecutor(8) as pool:
        adapters = set(map(id, pool.map(acquire, range(8))))
    assert reads == ["certainty"]
    assert len(adapters) == 1


def test_a_slow_read_delays_neither_other_adapters_nor_the_listing(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reading, go_on = registry.load_adapter, threading.Event(), threading.Event()

    def slow(files: Any, **kwargs: Any) -> Any:
        if kwargs["name"] == "certainty":
            reading.set()
            assert go_on.wait(60)
        return real(files, **kwargs)

    monkeypatch.setattr(registry, "load_adapter", slow)
    with ThreadPoolExecutor(1) as pool:
        slow_lease = pool.submit(opened.registry.acquire, "certainty")
        assert reading.wait(60)
        opened.registry.acquire("jailbreak").release()
        assert opened.info("jailbreak").resident
        opened.registry.unload("jailbreak")
        go_on.set()
        assert slow_lease.result(60).adapter.info.name == "certainty"


def test_many_threads_on_a_small_budget_with_changing_files_always_get_whole_adapters(
    root: Path, llama: AdapterHost, save_adapter: SaveAdapter
) -> None:
    versions = {}
    for seed in (1, 2):
        path = save_adapter(root.with_name(f"version-{seed}") / "certainty", seed=seed)
        versions[Opened(path.parent, base=llama).info("certainty").digest] = path
    opened = Opened(root, base=llama, max_resident_bytes=1)
    expected = {
        digest: Opened(path.parent, base=llama).registry.acquire("certainty").adapter
        for digest, path in versions.items()
    }
    rewritten = threading.Event()

    def rewrite() -> None:
        for path in list(versions.values()) * 30:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                staged = root / f".{name}"
                shutil.copyfile(path / name, staged)
                staged.replace(root / "certainty" / name)
        rewritten.set()

    def use_once() -> AdapterDigest:
        with opened.registry.acquire("certainty") as lease:
            if reference := expected.get(lease.adapter.digest):
                for name, pair in lease.adapter.pairs.items():
                    assert torch.equal(pair.a, reference.pairs[name].a)
                    assert torch.equal(pair.b, reference.pairs[name].b)
            return lease.adapter.digest

    def use_until_rewritten(_: int) -> AdapterDigest:
        while not rewritten.is_set():
            try:
                use_once()
            except AdapterRefusedError as error:
                assert "keep changing" in str(error)  # noqa: PT017 - the writer may win every attempt
        return use_once()

    writer = threading.Thread(target=rewrite)
    writer.start()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(use_until_rewritten, range(4))) == {list(versions)[-1]}
    writer.join()
    assert opened.registry.resident_bytes() == 0, "no lease is left behind"


def test_a_scan_is_sorted_whatever_the_file_system_says(root: Path, save_adapter: SaveAdapter) -> None:
    save_adapter(root / "a-last-one")
    assert list(catalog.scan([root]).found) == ["a-last-one", "certainty", "jailbreak"]


DEFINITION = b"model: ~\nresponse_format: ~\ntransformations: ~\n"


def test_a_definition_is_told_as_it_lies_there(root: Path, opened: Opened) -> None:
    with pytest.raises(IntrinsicUndefinedError, match=r"'certainty' has no io\.yaml"):
        opened.registry.definition("certainty")
    file = root / "certainty" / "io.yaml"
    file.write_bytes(DEFINITION)
    assert opened.registry.definition("certainty") == DEFINITION
    digest = opened.info("certainty").intrinsic_digest
    assert digest == hashlib.sha256(DEFINITION).hexdigest()
    file.write_bytes(DEFINITION + b"instruction: Sure?\n")
    opened.registry.refresh()
    assert opened.info("certainty").intrinsic_digest != digest
    file.unlink()
    opened.registry.refresh()
    assert opened.info("certainty").intrinsic_digest == ""


def test_another_definition_leaves_the_weights_and_who_uses_them_alone(root: Path, opened: Opened) -> None:
    with opened.registry.acquire("certainty") as before:
        (root / "certainty" / "io.yaml").write_bytes(DEFINITION)
        opened.registry.refresh()
        with opened.registry.acquire("certainty") as after:
            assert after.adapter is before.adapter
    assert opened.registry.resident_bytes() == before.adapter.size_bytes


@pytest.mark.parametrize("content", [DEFINITION + b"colour: red\n", b"#" * (1 << 17)])
def test_a_definition_that_is_not_understood_refuses_the_adapter(root: Path, opened: Opened, content: bytes) -> None:
    (root / "certainty" / "io.yaml").write_bytes(content)
    opened.registry.refresh()
    assert "io.yaml" in opened.info("certainty").problem
    for use in (opened.registry.acquire, opened.registry.definition):
        with pytest.raises(AdapterRefusedError, match=r"io\.yaml"):
            use("certainty")


def test_a_definition_outside_the_root_is_not_read(root: Path, opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_bytes(DEFINITION)
    (root / "certainty" / "io.yaml").symlink_to(tmp_path / "secret.yaml")
    opened.registry.refresh()
    assert "io.yaml leads out of the adapter root" in opened.info("certainty").problem

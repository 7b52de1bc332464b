"""Settings come from the strongest source that has them, and a wrong one stops the start by name and value."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alora_serve.config import (
    GROUPS,
    AdapterSettings,
    EngineSettings,
    ModelSettings,
    RouterSettings,
    SecretSettings,
    ServerSettings,
    StoreSettings,
    configuration_table,
    default_cache_directory,
    env_name,
    flag_name,
    known_names,
    load_settings,
    run_with_settings,
)
from alora_serve.errors import ConfigError, HandleInvalidError
from alora_serve.handles import HandleSigner
from alora_serve.types import PrefixHandle, PromptKind


class WorkerSettings(ServerSettings, ModelSettings, StoreSettings, EngineSettings, AdapterSettings, SecretSettings):
    """A worker."""


class FrontSettings(ServerSettings, RouterSettings):
    """A router."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("ALORA_"):
            monkeypatch.delenv(name)


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[str], str]:
    """Writes a file and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text, "utf-8")
        return str(path)

    return write


def load(*argv: str) -> WorkerSettings:
    return load_settings(WorkerSettings, argv)


def test_flags_beat_variables_beat_the_file_beats_defaults(
    monkeypatch: pytest.MonkeyPatch, config_file: Callable[[str], str]
) -> None:
    assert load().max_queue == 100
    monkeypatch.setenv("ALORA_CONFIG", config_file("max_queue: 1\nthreads: 1\nmodel: file"))
    assert (load().max_queue, load().threads, load().model) == (1, 1, "file")
    monkeypatch.setenv("ALORA_MAX_QUEUE", "2")
    monkeypatch.setenv("ALORA_THREADS", "2")
    assert (load().max_queue, load().threads, load().model) == (2, 2, "file")
    loaded = load("--max-queue", "3")
    assert (loaded.max_queue, loaded.threads, loaded.model) == (3, 2, "file")


def test_the_flag_for_the_file_beats_the_variable(
    monkeypatch: pytest.MonkeyPatch, config_file: Callable[[str], str]
) -> None:
    monkeypatch.setenv("ALORA_CONFIG", "/nowhere.yaml")
    assert load("--config", config_file("max_queue: 1")).max_queue == 1
    assert load(f"--config={config_file('max_queue: 2')}").max_queue == 2


@pytest.mark.parametrize(("text", "size_bytes"), [("512MiB", 512 << 20), ("1GB", 10**9), ("77", 77)])
def test_sizes_may_have_units(text: str, size_bytes: int) -> None:
    assert load("--store-budget-bytes", text).store_budget_bytes == size_bytes


def test_lists_are_commas_in_flags_and_variables_and_lists_in_files(
    monkeypatch: pytest.MonkeyPatch, config_file: Callable[[str], str]
) -> None:
    monkeypatch.setenv("ALORA_DECODE_ENDPOINTS", "a:1, dns:///b:2,")
    loaded = load_settings(FrontSettings, ["--base-prefill-endpoints", "c:3"])
    assert loaded.decode_endpoints == ("a:1", "dns:///b:2")
    assert loaded.base_prefill_endpoints == ("c:3",)
    assert load("--config", config_file("adapter_roots: [/a, /b]")).adapter_roots == (Path("/a"), Path("/b"))


def test_one_environment_and_one_file_serve_all_services(
    monkeypatch: pytest.MonkeyPatch, config_file: Callable[[str], str]
) -> None:
    monkeypatch.setenv("ALORA_RESOLVE_SECONDS", "9")
    path = config_file("max_attempts: 7\nmax_queue: 5")
    assert load("--config", path).max_queue == 5
    front = load_settings(FrontSettings, ["--config", path])
    assert (front.resolve_seconds, front.max_attempts) == (9.0, 7)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--max-qeue", "3"], ["--max-qeue", "did you mean --max-queue?"]),
        (["--max-qeue=3"], ["--max-qeue=3", "did you mean --max-queue?"]),
        (["--max_queue", "3"], ["--max_queue", "did you mean --max-queue?"]),
        (["--zzzzzzzz"], ["--zzzzzzzz"]),
        (["loose"], ["loose"]),
        (["--resolve-seconds", "1"], ["--resolve-seconds"]),  # of another service
        (["--max-queue"], ["--max-queue"]),
        (["--config"], ["--config"]),
        (["--config", "/nowhere.yaml"], ["config='/nowhere.yaml'", "no such file"]),
        (["--max-queue", "many"], ["max_queue='many'", "integer", "--max-queue", "ALORA_MAX_QUEUE"]),
        (["--max-queue", "-1"], ["max_queue='-1'", "greater than or equal to 0"]),
        (["--dtype", "float16"], ["dtype='float16'", "bfloat16"]),
        (["--device", "gpu"], ["device='gpu'", "cpu|cuda"]),
        (["--device", "cuda:x"], ["device='cuda:x'", "cpu|cuda"]),
        (["--store-budget-bytes", "5 elephants"], ["store_budget_bytes='5 elephants'"]),
    ],
)
def test_a_wrong_flag_is_named_with_its_value(argv: list[str], says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    for part in says:
        assert part in str(caught.value)


def test_a_flag_that_resembles_none_is_named_without_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"^unrecognized arguments: --nope 3$"):
        load("--nope", "3")


def test_all_wrong_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALORA_MAX_QUEUE", "")
    with pytest.raises(ConfigError, match=r"max_queue=''.*; log_level='loud'|log_level='loud'.*; max_queue=''"):
        load("--log-level", "loud")


def test_an_unknown_variable_is_named_with_its_value_and_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALORA_MAX_QEUE", "3")
    with pytest.raises(ConfigError, match=r"ALORA_MAX_QEUE='3'; did you mean ALORA_MAX_QUEUE\?"):
        load()


@pytest.mark.parametrize("variable", ["ALORA_TEST_REQUIRE_ALL", "ALORA_CACHE_DIR", "ALORA_ADDRESS"])
def test_variables_that_are_no_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    load()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_qeue: 3", r"settings\.yaml: unknown setting max_qeue=3; did you mean max_queue\?"),
        ("zzzzzzzz: 3", r"unknown setting zzzzzzzz=3$"),
        ("7: 3", "unknown setting 7=3"),
        ("max_queue: many", "max_queue='many'"),
        ("max_queue: [", r"settings\.yaml'.*no YAML"),
        ("[1, 2]", r"settings\.yaml'.*no YAML"),
        ("just words", r"settings\.yaml'.*no YAML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key_and_value(config_file: Callable[[str], str], text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load("--config", config_file(text))


def test_an_empty_file_changes_nothing(config_file: Callable[[str], str]) -> None:
    assert load("--config", config_file("# nothing yet\n")).max_queue == 100


def test_secrets_come_from_variables_or_the_file(
    monkeypatch: pytest.MonkeyPatch, config_file: Callable[[str], str]
) -> None:
    monkeypatch.setenv("ALORA_HANDLE_SECRETS", "new,old")
    loaded = load("--config", config_file("tenant_salt: grains"))
    assert [secret.get_secret_value() for secret in loaded.handle_secrets] == ["new", "old"]
    assert loaded.tenant_salt.get_secret_value() == "grains"
    assert not {"new", "old", "grains"} & set(repr(loaded).replace("'", " ").split())


@pytest.mark.parametrize("flag", ["--handle-secrets", "--handle-secret", "--tenant-salt"])
@pytest.mark.parametrize("form", ["{0} hunter2", "{0}=hunter2"])
def test_secrets_are_no_flags_and_never_repeated(flag: str, form: str) -> None:
    with pytest.raises(ConfigError, match=r"set ALORA_(HANDLE_SECRETS|TENANT_SALT)") as caught:
        load(*form.format(flag).split())
    assert "hunter2" not in str(caught.value)


def test_a_misspelt_secret_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch, config_file: Callable[[str], str]
) -> None:
    with pytest.raises(ConfigError, match=r"handle_secrest=\(hidden\); did you mean handle_secrets") as caught:
        load("--config", config_file("handle_secrest: hunter2"))
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("ALORA_TENNANT_SALT", "hunter2")
    with pytest.raises(ConfigError, match=r"ALORA_TENNANT_SALT=\(hidden\)"):
        load()


def test_an_unfit_secret_is_named_without_its_value(config_file: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match=r"handle_secrets=\(hidden\)") as caught:
        load("--config", config_file("handle_secrets: {hunter2: hunter2}"))
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None, "a traceback would show it"


def test_help_lists_flags_defaults_and_how_variables_are_spelt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("A worker.", "--max-queue", "(default: 100)", "ALORA_SOME_NAME", "ALORA_HANDLE_SECRETS"):
        assert part in shown
    assert "--handle-secrets" not in shown
    assert "--resolve-seconds" not in shown


def test_a_main_prints_what_is_wrong_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["worker", "--max-queue", "4"])
    assert run_with_settings(WorkerSettings).max_queue == 4
    with pytest.raises(SystemExit) as caught:
        run_with_settings(WorkerSettings, ["--max-queue", "many"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: max_queue='many'")


def test_settings_do_not_change_once_loaded() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().max_queue = 3  # type: ignore[misc]


def test_every_setting_has_a_description_and_one_group() -> None:
    own = [set(group.model_fields) - {"config"} for group in GROUPS]
    assert sum(map(len, own)) == len(known_names() - {"config"}), "two groups have a setting of the same name"
    assert all(field.description for group in GROUPS for field in group.model_fields.values())


def test_the_table_has_every_setting_once() -> None:
    lines = configuration_table().splitlines()
    for name in known_names():
        assert sum(f"`{env_name(name)}`" in line for line in lines) == 1, name
    assert any("`--store-budget-bytes`" in line and "`4.0GiB`" in line for line in lines)
    assert not any(flag_name("handle_secrets") in line for line in lines)


def test_the_module_prints_the_table() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "alora_serve.config"], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout == configuration_table()


def test_the_cache_directory_is_the_same_for_every_process_that_inherits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALORA_CACHE_DIR", "cache")
    assert default_cache_directory() == tmp_path / "cache"
    monkeypatch.setenv("ALORA_CACHE_DIR", "~/cache")
    assert default_cache_directory() == Path.home() / "cache"


def test_the_secrets_and_the_salt_decide_whose_handles_are_accepted() -> None:
    old, new = "a secret of 16 bytes", "another secret of 16"
    handle = PrefixHandle(
        b"m" * 32, b"s" * 32, (1,), (), PromptKind.TOKENS, "", open_turn=False, expires_unix_seconds=0
    )

    def signer(*secrets: str, salt: str = "") -> HandleSigner:
        return SecretSettings(handle_secrets=secrets, tenant_salt=salt).signer()

    signer(new, old, salt="t").verify(signer(old, salt="t").sign(handle))
    with pytest.raises(HandleInvalidError):
        signer(new, salt="t").verify(signer(old, salt="t").sign(handle))
    with pytest.raises(HandleInvalidError):
        signer(old).verify(signer(old, salt="t").sign(handle))


def test_without_a_secret_there_is_no_signer_but_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"handle_secrets is empty: set ALORA_HANDLE_SECRETS .* for example \S{32}$"):
        SecretSettings().signer()
    with pytest.raises(ConfigError, match="at least one secret of 16 bytes"):
        SecretSettings(handle_secrets=("short",)).signer()


def test_as_installed_services_listen_on_loopback_alone() -> None:
    settings = load()
    assert {settings.listen.rpartition(":")[0], settings.metrics_listen.rpartition(":")[0]} == {"127.0.0.1"}
    assert (settings.health_listen, settings.allow_insecure) == ("", False)

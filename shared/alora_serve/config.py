"""Settings: what each group means, where values come from, and how a wrong one stops the start.

A service mixes the groups below into its settings. Sources, strongest first: command-line flags, environment variables
``ALORA_*``, a YAML file (``--config`` or ``ALORA_CONFIG``), defaults. One environment may serve all services of a host:
a variable that belongs to another group is ignored, one that belongs to none is an error.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from alora_serve.errors import ConfigError

ENV_PREFIX = "ALORA_"
OTHER_VARIABLES = frozenset({"ALORA_CACHE_DIR", "ALORA_CONFIG"})
"""Variables of this prefix that are not settings of a service."""
TEST_PREFIX = "ALORA_TEST_"


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""``a,b,c`` in the environment and on the command line, a list in YAML."""
PathList = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]
SecretList = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]


class SettingsGroup(BaseSettings):
    """Base of all groups."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, cli_kebab_case=True, cli_hide_none_type=True
    )

    config: Path | None = Field(None, description="YAML file with settings; flags and environment override it.")


class ServerSettings(SettingsGroup):
    """Where a service listens and how it ends."""

    listen: str = Field("127.0.0.1:0", description="host:port of the gRPC server; port 0 takes a free one.")
    metrics_listen: str = Field("127.0.0.1:0", description="host:port of Prometheus /metrics; port 0 takes a free one.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")
    log_format: Literal["json", "console"] = Field("json", description="json for machines, console for people.")
    drain_seconds: float = Field(30.0, ge=0, description="On SIGTERM, how long running requests may take to finish.")
    reflection: bool = Field(True, description="Serve gRPC reflection.")


class ModelSettings(SettingsGroup):
    """The base model."""

    model: str = Field("demo", description="Directory, Hugging Face hub id, or demo (SmolLM2-135M-Instruct).")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute dtype; auto is bfloat16 where the processor multiplies it natively."
    )
    device: str = Field("cpu", description="torch device.")
    threads: int = Field(0, ge=0, description="torch threads of the process; 0 leaves torch's default.")
    context_tokens: int | None = Field(None, ge=2, description="Longest prompt plus answer; unset: the model's.")


class StoreSettings(SettingsGroup):
    """The shared KV store."""

    store_url: str = Field("lmdb:", description="lmdb:, lmdb:///dir, redis://host:port/db or unix:///socket.")
    store_budget_bytes: ByteSize = Field(
        ByteSize(4 << 30), description="LMDB: bytes kept before the oldest are dropped."
    )
    store_ttl_seconds: int = Field(86400, ge=1, description="Redis/Valkey: a block not written for so long expires.")
    store_timeout_seconds: float = Field(0.5, gt=0, description="Longest a store call may take, besides its transfer.")
    store_bytes_per_second: float = Field(20e6, gt=0, description="Slowest transfer the store is waited for.")
    breaker_failures: int = Field(5, ge=1, description="Store failures in a row that open the circuit breaker.")
    breaker_reset_seconds: float = Field(5.0, gt=0, description="Time until an open breaker lets a probe through.")
    block_tokens: int | None = Field(None, ge=1, le=4096, description="Tokens a stored block; unset: by KV size.")


class EngineSettings(SettingsGroup):
    """The batch."""

    max_batch_sequences: int = Field(32, ge=1, description="Sequences in one batch.")
    max_step_tokens: int = Field(256, ge=1, description="Prompt tokens of one step: the chunk of a prefill.")
    max_queue: int = Field(100, ge=0, description="Requests that may wait for a place before RESOURCE_EXHAUSTED.")
    prefix_cache_bytes: ByteSize = Field(ByteSize(1 << 30), description="Memory for resident base KV.")


class AdapterSettings(SettingsGroup):
    """Where adapters are."""

    adapter_roots: PathList = Field((), description="Directories whose subdirectories are PEFT adapters.")
    adapter_cache_bytes: ByteSize = Field(ByteSize(1 << 30), description="Memory for adapter weights not in use.")
    adapter_scan_seconds: float = Field(5.0, gt=0, description="How often the roots are looked at for changes.")


class SecretSettings(SettingsGroup):
    """What signs handles and keeps deployments apart. The same on every replica."""

    handle_secrets: SecretList = Field(
        (), description="Secrets that sign prefix handles, >= 16 bytes each; the first signs, all verify. Required."
    )
    tenant_salt: SecretStr = Field(
        SecretStr(""), description="Mixed into block names and handles; another salt shares none."
    )
    handle_ttl_seconds: int = Field(86400, ge=1, description="How long a prefix handle is accepted.")


class RouterSettings(SettingsGroup):
    """Whom the router talks to."""

    base_prefill_endpoints: CommaList = Field(
        (),
        description="host:port of base prefill services, or dns:///name:port, resolved again and again. Required.",
    )
    decode_endpoints: CommaList = Field((), description="The same for decode workers. Required.")
    resolve_seconds: float = Field(2.0, gt=0, description="How often names are resolved.")
    bounded_load_factor: float = Field(1.25, ge=1, description="A worker takes at most so many times the mean load.")
    max_attempts: int = Field(3, ge=1, description="Endpoints tried for one request.")
    max_in_flight: int = Field(1000, ge=1, description="Requests in the router before RESOURCE_EXHAUSTED.")
    default_deadline_seconds: float = Field(600.0, gt=0, description="Deadline of calls whose client sets none.")


GROUPS: tuple[type[SettingsGroup], ...] = (
    ServerSettings,
    ModelSettings,
    StoreSettings,
    EngineSettings,
    AdapterSettings,
    SecretSettings,
    RouterSettings,
)
"""Every group; together they define which names exist."""

Loaded = TypeVar("Loaded", bound=SettingsGroup)


def known_names() -> frozenset[str]:
    """Names of all settings of all groups."""
    return frozenset(name for group in GROUPS for name in group.model_fields)


def load_settings(settings: type[Loaded], argv: Sequence[str]) -> Loaded:
    """Read one service's settings from flags, environment and file.

    Raises:
        ConfigError: an unknown flag, variable or key, or a value that does not parse; names it, and the nearest name.
        SystemExit: ``--help`` was asked for.
    """
    _check_environment(os.environ)
    path = _config_path(argv, os.environ)

    class FromFile(settings):  # type: ignore[misc, valid-type] # the file's path is known only now
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return env_settings, _OwnKeys(settings_cls, path)

    FromFile.__name__ = settings.__name__
    FromFile.__doc__ = settings.__doc__
    try:
        loaded: Loaded = FromFile(_cli_parse_args=list(argv), _cli_exit_on_error=False)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(settings, detail) for detail in error.errors())) from error
    except SettingsError as error:
        raise ConfigError(_with_nearest_flag(str(error))) from error
    return loaded


class _OwnKeys(YamlConfigSettingsSource):
    """The YAML file, whose keys of other groups are left to other services."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path | None) -> None:
        super().__init__(settings_cls, yaml_file=path)
        own = settings_cls.model_fields
        for key in list(self.yaml_data):
            if key not in known_names():
                raise ConfigError(
                    f"{path}: unknown setting {key!r}={self.yaml_data[key]!r}{_nearest(key, known_names())}"
                )
            if key not in own:
                del self.yaml_data[key]
        self.init_kwargs = self.yaml_data


def _config_path(argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        given, _ = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    chosen = given.config or environ.get("ALORA_CONFIG")
    if not chosen:
        return None
    if not Path(chosen).is_file():
        raise ConfigError(f"config={chosen!r}: no such file")
    return Path(chosen)


def _check_environment(environ: Mapping[str, str]) -> None:
    known = {ENV_PREFIX + name.upper() for name in known_names()} | OTHER_VARIABLES
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and not name.startswith(TEST_PREFIX) and name not in known:
            value = "(hidden)" if "SECRET" in name or "SALT" in name else repr(environ[name])
            raise ConfigError(f"unknown environment variable {name}={value}{_nearest(name, known)}")


def _nearest(name: str, known: frozenset[str] | set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _with_nearest_flag(message: str) -> str:
    flags = {"--" + name.replace("_", "-") for name in known_names()}
    for word in message.split():
        if word.startswith("--") and word not in flags:
            return message + _nearest(word.partition("=")[0], flags)
    return message


def _describe(settings: type[SettingsGroup], detail: Mapping[str, Any]) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else "settings"
    secret = "secret" in name or "salt" in name
    value = "(hidden)" if secret else repr(detail["input"])
    return f"{name}={value}: {detail['msg']} (flag --{name.replace('_', '-')}, variable {ENV_PREFIX}{name.upper()})"


def run_with_settings(settings: type[Loaded], argv: Sequence[str] | None = None) -> Loaded:
    """:func:`load_settings` for a ``__main__``: a wrong setting is printed and ends the process with status 2."""
    try:
        return load_settings(settings, sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def configuration_rows() -> Iterator[tuple[str, str, str, str, str]]:
    """For each setting: group, flag, variable, default, description. The documentation's table is made of these."""
    for group in GROUPS:
        for name, info in group.model_fields.items():
            if name in SettingsGroup.model_fields and group is not GROUPS[0]:
                continue
            default = "" if info.default in (PydanticUndefined, None, ()) else str(info.default)
            if isinstance(info.default, ByteSize):
                default = info.default.human_readable()
            yield (
                group.__name__,
                "--" + name.replace("_", "-"),
                ENV_PREFIX + name.upper(),
                default,
                info.description or "",
            )


def configuration_table() -> str:
    """All settings as a Markdown document body, a table a group."""
    lines: list[str] = []
    shown = ""
    for group, flag, variable, default, description in configuration_rows():
        if group != shown:
            shown = group
            summary = next(g for g in GROUPS if g.__name__ == group).__doc__ or ""
            lines += ["", f"## {group.removesuffix('Settings')}", "", summary, ""]
            lines += ["| flag | variable | default | meaning |", "|---|---|---|---|"]
        lines.append(f"| `{flag}` | `{variable}` | {f'`{default}`' if default else ''} | {description} |")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    print(configuration_table(), end="")

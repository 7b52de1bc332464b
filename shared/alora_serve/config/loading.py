"""Where settings come from, strongest first: flags, ``ALORA_*`` variables, a YAML file, defaults.

One environment or file may serve all services of a host: a name that belongs to another service is ignored, one that
belongs to none stops the start, and so does a value that does not fit.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from alora_serve.config.cache_directory import CACHE_DIRECTORY_VARIABLE
from alora_serve.config.groups import ENV_PREFIX, SettingsGroup
from alora_serve.config.names import SECRET_NAMES, env_name, flag_name, known_names
from alora_serve.errors import ConfigError
from alora_serve.safe_yaml import load_yaml

TEST_PREFIX: Final = "ALORA_TEST_"
"""Variables of the tests."""
OTHER_VARIABLES: Final = frozenset(
    {
        "ALORA_ADDRESS",
        "ALORA_API_KEY",
        "ALORA_CLIENT_TLS_CA_FILE",
        "ALORA_CLIENT_TLS_CERT_FILE",
        "ALORA_CLIENT_TLS_KEY_FILE",
        "ALORA_CLIENT_TLS_SERVER_NAME",
        CACHE_DIRECTORY_VARIABLE,
    }
)
"""Variables of our prefix that are not settings of a service."""

CONFIG_EXIT_CODE: Final = 2

Loaded = TypeVar("Loaded", bound=SettingsGroup)


def load_settings(settings: type[Loaded], argv: Sequence[str]) -> Loaded:
    """Read one service's settings from flags, environment and file.

    Raises:
        ConfigError: an unknown flag, variable or key, or a value that does not parse; names it, and the nearest name.
        SystemExit: ``--help`` was asked for.
    """
    _refuse_secret_flags(argv)
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
    FromFile.__doc__ = (
        f"{settings.__doc__} A flag --some-name is also the variable {ENV_PREFIX}SOME_NAME and the key some_name of "
        f"the file. Secrets are variables or keys only: {', '.join(map(env_name, sorted(SECRET_NAMES)))}."
    )
    try:
        loaded: Loaded = FromFile(_cli_parse_args=list(argv), _cli_exit_on_error=False)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(detail) for detail in error.errors())) from None  # it holds secrets
    except SettingsError as error:
        raise ConfigError(_with_nearest_flag(str(error).removeprefix("error parsing CLI: "))) from error
    return loaded


def run_with_settings(settings: type[Loaded], argv: Sequence[str] | None = None) -> Loaded:
    """:func:`load_settings` for a ``__main__``: a wrong setting is printed and ends the process with status 2."""
    try:
        return load_settings(settings, sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(CONFIG_EXIT_CODE) from error


class _OwnKeys(InitSettingsSource):
    """The YAML file, whose keys of other groups are left to other services."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path | None) -> None:
        content = _read_yaml(path) if path else {}
        for key in content:
            if key not in known_names():
                raise ConfigError(f"{path}: unknown setting {_unknown(str(key), content[key], known_names())}")
        super().__init__(settings_cls, {key: content[key] for key in content if key in settings_cls.model_fields})


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        content = load_yaml(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config={str(path)!r}: is no YAML file: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config={str(path)!r}: is no YAML mapping of settings to values")
    return content


def _config_path(argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config")
    try:
        given, _ = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    chosen = given.config or environ.get(env_name("config"))
    if not chosen:
        return None
    if not Path(chosen).is_file():
        raise ConfigError(f"config={chosen!r}: no such file")
    return Path(chosen)


def _refuse_secret_flags(argv: Sequence[str]) -> None:
    for argument in argv:
        flag = argument.partition("=")[0]
        if not flag.startswith("--"):
            continue
        nearest = _nearest(flag, map(flag_name, known_names()))
        for name in SECRET_NAMES:
            if nearest == flag_name(name):
                raise ConfigError(f"{flag} is no flag: set {env_name(name)}, because every user can read flags")


def _check_environment(environ: Mapping[str, str]) -> None:
    known = {env_name(name) for name in known_names()} | OTHER_VARIABLES
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and not name.startswith(TEST_PREFIX) and name not in known:
            raise ConfigError(f"unknown environment variable {_unknown(name, environ[name], known)}")


def _unknown(name: str, value: object, known: Iterable[str]) -> str:
    """The name, its value unless it may be a misspelt secret, and the nearest known name."""
    nearest = _nearest(name, known)
    is_secret = nearest is not None and nearest.removeprefix(ENV_PREFIX).lower() in SECRET_NAMES
    hint = f"; did you mean {nearest}?" if nearest else ""
    return f"{name}={'(hidden)' if is_secret else repr(value)}{hint}"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def _with_nearest_flag(message: str) -> str:
    """What the parser says, and the flag that an unknown one may have been meant for."""
    names = {flag_name(name).removeprefix("--") for name in known_names()}
    for word in message.split():
        if word.startswith("--"):
            # Without the dashes, which would make any short flag look like any other.
            name = word.removeprefix("--").partition("=")[0].rstrip(":")
            if name not in names and (nearest := _nearest(name, names)):
                return f"{message}; did you mean --{nearest}?"
    return message


def _describe(detail: Mapping[str, Any]) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else "settings"
    if name in SECRET_NAMES:
        return f"{name}=(hidden): {detail['msg']} (variable {env_name(name)})"
    return f"{name}={detail['input']!r}: {detail['msg']} (flag {flag_name(name)}, variable {env_name(name)})"

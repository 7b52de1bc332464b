"""The access file: tenants with their quotas, and the keys that their callers show."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AwareDatetime, BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from alora_serve.errors import ConfigError
from alora_serve.safe_yaml import load_yaml
from alora_serve.types import Role

TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quota(_Strict):
    """What one tenant may use of one router. Unset is without limit.

    Attributes:
        max_sequences: generations at once; each target of a fan-out is one.
        max_queued_tokens: prompt tokens of its requests at once.
        tokens_per_minute: tokens computed and generated; a minute's worth may be used at once.
        stored_bytes_per_day: KV written for it; beyond, its requests are answered and nothing new is stored.
    """

    max_sequences: int | None = Field(None, ge=1)
    max_queued_tokens: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    stored_bytes_per_day: ByteSize | None = Field(None, ge=1)


class ApiKey(_Strict):
    """A key by its digest: who reads the file cannot call with it.

    Attributes:
        tenant: whose it is.
        sha256: lower-case hex SHA-256 of the key, which is a random string of at least 128 bits.
        roles: what it is good for.
        expires: not taken from then on.
    """

    tenant: TenantName
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    roles: frozenset[Role] = frozenset({"generate"})
    expires: AwareDatetime | None = None

    def is_valid_at(self, moment: datetime) -> bool:
        """Not expired."""
        return self.expires is None or moment < self.expires


class AccessRules(_Strict):
    """The whole file. A tenant of a key needs an entry, if an empty one, so that no name is misspelt unnoticed.

    Attributes:
        default: the quota of tenants without an entry, as those of JWTs may be, and of what an entry does not say; an
            entry lifts a limit by ``null``.
        tenants: their quotas.
        keys: what their callers show.
    """

    default: Quota = Field(default_factory=lambda: Quota.model_validate({}))
    tenants: dict[TenantName, Quota] = Field(default_factory=dict)
    keys: tuple[ApiKey, ...] = ()

    def quota_of(self, tenant: str) -> Quota:
        """What a tenant may use."""
        return self.tenants.get(tenant, self.default)

    @model_validator(mode="before")
    @classmethod
    def _filled_entries(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        default, tenants = given.get("default") or {}, given.get("tenants") or {}
        if isinstance(default, dict) and isinstance(tenants, dict):
            tenants = {name: _filled(quota, default) for name, quota in tenants.items()}
        return {**given, "default": default, "tenants": tenants}

    @model_validator(mode="after")
    def _known_tenants(self) -> AccessRules:
        unknown = {key.tenant for key in self.keys} - self.tenants.keys()
        if unknown:
            raise ValueError(f"keys of tenants without an entry: {', '.join(sorted(unknown))}")
        return self


def _filled(quota: object, default: dict[object, object]) -> object:
    """An entry with what it does not say; what is no mapping is left for the complaint about it."""
    if quota is None:
        return default
    return {**default, **quota} if isinstance(quota, dict) else quota


def read_rules(path: Path) -> AccessRules:
    """Read and check a YAML file.

    Raises:
        ConfigError: it cannot be read, or says something that is not an access rule; names the place, no key.
    """
    try:
        return AccessRules.model_validate(load_yaml(path.read_text()) or {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"access_file {path}: {type(error).__name__}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # its text would quote the line, and keys in it
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise ConfigError(f"access_file {path}: {type(error).__name__}{line}") from error
    except ValidationError as error:
        # Without the inputs: they may be what somebody took for a place to put a key.
        found = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}"
            for problem in error.errors(include_input=False, include_url=False)
        )
        raise ConfigError(f"access_file {path}: {found}") from None

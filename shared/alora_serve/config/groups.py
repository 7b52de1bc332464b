"""Every setting there is, in groups that the services mix; a service may change a default, never add a name.

All names live here, so that one environment or one file serves all services and a misspelt name is still found.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr
from pydantic_settings import BaseSettings, CliSuppress, NoDecode, SettingsConfigDict

from alora_serve.errors import ConfigError
from alora_serve.handles import HandleSigner

ENV_PREFIX: Final = "ALORA_"


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

    listen: str = Field("127.0.0.1:0", description="host:port of the server; port 0 takes a free one.")
    tls_cert_file: str = Field("", description="PEM certificate chain of the server, read again when it changes.")
    tls_key_file: str = Field("", description="Its private key.")
    tls_client_ca_file: str = Field(
        "", description="PEM certificates that must sign clients'; empty: none is asked for."
    )
    allow_insecure: bool = Field(
        False, description="Listen without TLS elsewhere than on loopback: others on the network read and change all."
    )
    health_listen: str = Field(
        "",
        description=(
            "host:port that serves grpc.health.v1 and nothing else, in plain text, for probes that speak no TLS; "
            "empty: none."
        ),
    )
    metrics_listen: str = Field("127.0.0.1:0", description="host:port of Prometheus /metrics; port 0 takes a free one.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")
    log_format: Literal["json", "console"] = Field("json", description="json for machines, console for people.")
    drain_seconds: float = Field(30.0, ge=0, description="On SIGTERM, how long running requests may take to finish.")
    write_timeout_seconds: float = Field(
        30.0, gt=0, description="How long a message may wait for a client that stopped reading before it is cut off."
    )
    read_timeout_seconds: float = Field(
        30.0, gt=0, description="How long a request may take to arrive whole before it is given up."
    )
    reflection: bool = Field(True, description="Serve gRPC reflection.")


class ModelSettings(SettingsGroup):
    """The base model."""

    model: str = Field("demo", description="Directory, Hugging Face hub id, or demo (SmolLM2-135M-Instruct).")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute dtype; auto is bfloat16 where the device multiplies it natively."
    )
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description=(
            "Where the model runs and resident KV lies: cpu, cuda or cuda:N. CUDA has never been run on hardware. "
            "Services on other devices share no KV."
        ),
    )
    threads: int = Field(
        0, ge=0, description="torch threads of each process; 0 is OMP_NUM_THREADS or, where that is unset, one a core."
    )
    context_tokens: int | None = Field(None, ge=2, description="Longest prompt plus answer; unset: the model's.")
    pack_weights: bool = Field(
        True,
        description=(
            "Lay weights out for the fastest kernels: shorter steps, but fp32 products round up to twice as much: "
            "logits of 40 move by about 2e-4; off, cold logits are within 1e-4 of PEFT's in float64. Services that "
            "differ share no KV."
        ),
    )
    weight_quantization: Literal["none", "int8"] = Field(
        "none",
        description=(
            "int8 rounds the weights of linear layers: a quarter of float32's memory, and another model than the "
            "checkpoint, with other tokens. Services that differ share no KV."
        ),
    )
    digest_cache_dir: str = Field(
        "",
        description=(
            "Where the digest of the weight files is kept, so that the next start need not read them to name them; "
            "empty: in the cache directory."
        ),
    )


class StoreSettings(SettingsGroup):
    """The shared KV store."""

    store_url: str = Field(
        "lmdb:",
        description=(
            "lmdb:, lmdb:///dir, redis://host:port/db, unix:///socket, redis+cluster://host:port,host:port or "
            "redis+sentinel://host:port,host:port/master/db; rediss for TLS."
        ),
    )
    store_tls_ca_file: str = Field(
        "", description="PEM certificates that sign the store's; empty: the system's. Refused without rediss."
    )
    store_tls_cert_file: str = Field("", description="PEM certificate to show the store, where it asks for one.")
    store_tls_key_file: str = Field("", description="Its private key.")
    store_tls_check_hostname: bool = Field(True, description="The store's certificate must name its host.")
    store_protection: Literal["none", "mac", "encrypt"] = Field(
        "none",
        description=(
            "mac: values that no service of this deployment wrote are not used; encrypt: nor can they be read. "
            "Services that differ share no KV."
        ),
    )
    store_secrets: CliSuppress[SecretList] = Field(
        (), description="Secrets for store_protection, >= 16 bytes each; the first seals, all open."
    )
    store_budget_bytes: ByteSize = Field(
        ByteSize(4 << 30), description="LMDB: bytes kept before the oldest are dropped."
    )
    store_ttl_seconds: int = Field(86400, ge=1, description="Redis/Valkey: a block not written for so long expires.")
    store_timeout_seconds: float = Field(0.5, gt=0, description="Longest a store call may take, besides its transfer.")
    store_bytes_per_second: float = Field(20e6, gt=0, description="Slowest transfer the store is waited for.")
    breaker_failures: int = Field(5, ge=1, description="Store failures in a row that open the circuit breaker.")
    breaker_reset_seconds: float = Field(5.0, gt=0, description="Time until an open breaker lets a probe through.")
    always_fetch: bool = Field(
        False, description="Fetch stored KV even where computing it again has been measured to be faster."
    )
    block_tokens: int | None = Field(None, ge=1, le=4096, description="Tokens a stored block; unset: by KV size.")


class EngineSettings(SettingsGroup):
    """The batch."""

    max_batch_sequences: int = Field(32, ge=1, description="Sequences in one batch.")
    max_step_tokens: int = Field(256, ge=1, description="Prompt tokens of one step: the chunk of a prefill.")
    max_mixed_step_tokens: int = Field(
        64, ge=1, description="Prompt tokens of a step that others decode in: the longer, the longer they wait for it."
    )
    max_queue: int = Field(100, ge=0, description="Requests that may wait for a place before RESOURCE_EXHAUSTED.")
    prefix_cache_bytes: ByteSize = Field(ByteSize(1 << 30), description="Memory for resident base KV.")
    orca_load_reports: bool = Field(
        True,
        description=(
            "Tell callers in trailing metadata how busy the process is (ORCA): Envoy and gRPC clients can weigh by it."
        ),
    )


class ShareSettings(SettingsGroup):
    """What one tenant leaves to the others."""

    tenant_share: float = Field(
        0.75, gt=0, le=1, description="How much of batch and queue, or of max_in_flight, one tenant may hold."
    )


class PrefillSettings(SettingsGroup):
    """What becomes of prefills that no base prefill service can take."""

    workers_prefill: bool = Field(
        False,
        description=(
            "Decode workers prefill, too, while no base prefill service can: slower, but no error. "
            "The same on routers and workers."
        ),
    )


class AdapterSettings(SettingsGroup):
    """Where adapters are."""

    adapter_roots: PathList = Field((), description="Directories whose subdirectories are PEFT adapters.")
    adapter_cache_bytes: ByteSize = Field(ByteSize(1 << 30), description="Memory for adapter weights not in use.")
    adapter_scan_seconds: float = Field(5.0, gt=0, description="How often the roots are looked at for changes.")


class SecretSettings(SettingsGroup):
    """What signs handles and keeps deployments apart. The same on every replica. Secrets are never flags."""

    handle_secrets: CliSuppress[SecretList] = Field(
        (), description="Secrets that sign prefix handles, >= 16 bytes each; the first signs, all verify. Required."
    )
    tenant_salt: CliSuppress[SecretStr] = Field(
        SecretStr(""), description="Mixed into block names and handles; another salt shares none."
    )
    public_prompts_file: Path | None = Field(
        None,
        description=(
            "YAML list of system prompts that are no secret: tenants share the KV of what begins with one. "
            "The same on every service."
        ),
    )
    handle_ttl_seconds: int = Field(86400, ge=1, description="How long a prefix handle is accepted.")

    def signer(self) -> HandleSigner:
        """Signs and verifies prefix handles as every other replica and service of the deployment does.

        Raises:
            ConfigError: no secret (replicas with secrets of their own would refuse each other's handles), or one that
                is too short.
        """
        keys = [secret.get_secret_value().encode() for secret in self.handle_secrets]
        if not keys:
            raise ConfigError(
                "handle_secrets is empty: set ALORA_HANDLE_SECRETS to the same secret on every service, for example "
                f"{secrets.token_urlsafe(24)}"
            )
        return HandleSigner(keys, self.tenant_salt.get_secret_value().encode(), self.handle_ttl_seconds)


class RouterSettings(SettingsGroup):
    """Whom the router talks to."""

    base_prefill_endpoints: CommaList = Field(
        (),
        description="host:port of base prefill services, or dns:///name:port, resolved again and again. Required.",
    )
    decode_endpoints: CommaList = Field((), description="The same for decode workers. Required.")
    resolve_seconds: float = Field(2.0, gt=0, description="How often names are resolved.")
    peer_tls_ca_file: str = Field("", description="PEM certificates that sign the services'; empty: no TLS to them.")
    peer_tls_cert_file: str = Field("", description="PEM certificate chain to show them, read again when it changes.")
    peer_tls_key_file: str = Field("", description="Its private key.")
    peer_tls_server_name: str = Field("", description="Name in the services' certificates; empty: their address.")
    bounded_load_factor: float = Field(1.25, ge=1, description="A worker takes at most so many times the mean load.")
    max_attempts: int = Field(3, ge=1, description="Endpoints tried in a row that get a request no further.")
    silence_seconds: float = Field(
        3.0, gt=0, description="An endpoint silent for longer is lost; a stream too, unless three steps take longer."
    )
    resume_wait_seconds: float = Field(
        30.0, gt=0, description="Longest wait of a stream that has begun for a worker that can go on with it."
    )
    max_in_flight: int = Field(1000, ge=1, description="Requests in the router before RESOURCE_EXHAUSTED.")
    default_deadline_seconds: float = Field(600.0, gt=0, description="Deadline of calls whose client sets none.")
    access_file: Path | None = Field(
        None,
        description=(
            "YAML file of tenants, quotas (JWTs' tenants', too) and API keys, read again when it changes. Unset: none."
        ),
    )
    jwks_file: Path | None = Field(None, description="JWKS file whose keys sign JWTs, read again when it changes.")
    jwt_issuer: str = Field("", description="Who issues JWTs (iss). Required with jwks_file.")
    jwt_audience: str = Field("", description="Whom JWTs are meant for (aud). Required with jwks_file.")
    jwt_tenant_claim: str = Field("tenant", description="The claim of a JWT that names the tenant.")
    jwt_roles_claim: str = Field("roles", description="The claim of a JWT that lists roles: generate, admin.")
    admin_methods: bool = Field(True, description="Serve LoadAdapter, UnloadAdapter and PurgeTenant.")


class FrontDoorSettings(SettingsGroup):
    """The HTTP front door, which speaks OpenAI's API (docs/http.md)."""

    router_address: str = Field("127.0.0.1:50051", description="host:port of a router, or dns:///name:port of several.")
    router_tls_ca_file: str = Field("", description="PEM certificates that sign the router's; empty: no TLS to it.")
    router_tls_cert_file: str = Field("", description="PEM certificate chain to show it, read again when it changes.")
    router_tls_key_file: str = Field("", description="Its private key.")
    router_tls_server_name: str = Field("", description="Name in the router's certificate; empty: its address.")
    http_idle_seconds: float = Field(
        75.0, gt=0, description="How long a connection stays open after a response, until the next request."
    )
    http_max_requests: int = Field(
        1000, ge=1, description="Requests at once, bodies that still arrive among them; the rest is 429."
    )
    default_max_tokens: int = Field(
        1024, ge=1, lt=2**32, description="Longest answer to a request that does not say, or what the context leaves."
    )
    page: bool = Field(True, description="Serve the page /ui.")


GROUPS: tuple[type[SettingsGroup], ...] = (
    ServerSettings,
    ModelSettings,
    StoreSettings,
    EngineSettings,
    AdapterSettings,
    SecretSettings,
    ShareSettings,
    PrefillSettings,
    RouterSettings,
    FrontDoorSettings,
)
"""Every group; together they define which names exist."""

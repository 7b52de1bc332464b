"""Redis and Valkey by URL: one server, a Cluster, or what Sentinels say is the master; with or without TLS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from alora_serve.errors import ConfigError
from alora_serve.kv.store_url import url_error

if TYPE_CHECKING:
    from alora_serve.config import StoreSettings

Address = tuple[str, int]
"""Host and port."""

Kind = Literal["standalone", "cluster", "sentinel"]

DEFAULT_PORT: Final = 6379
DEFAULT_SENTINEL_PORT: Final = 26379
OPTIONS: Final = ("db", "sentinel_username", "sentinel_password")
REDIS_SCHEMES: Final = frozenset(
    {
        "redis",
        "rediss",
        "unix",
        "redis+cluster",
        "rediss+cluster",
        "redis+sentinel",
        "rediss+sentinel",
    }
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """With whom to speak TLS, and as whom.

    Attributes:
        ca_file: PEM certificates that the server's is signed by; empty: those that the system trusts.
        cert_file: PEM certificate chain to show; empty: none.
        key_file: its private key; empty: in ``cert_file``.
        check_hostname: the certificate must name the host that was connected to.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    check_hostname: bool = True

    @classmethod
    def of(cls, settings: StoreSettings) -> TlsFiles:
        """As a service is told."""
        return cls(
            settings.store_tls_ca_file,
            settings.store_tls_cert_file,
            settings.store_tls_key_file,
            settings.store_tls_check_hostname,
        )

    @property
    def has_files(self) -> bool:
        """Whether any is named: whoever names one wants TLS."""
        return bool(self.ca_file or self.cert_file or self.key_file)

    def context(self, socket_class: type[ssl.SSLSocket] = ssl.SSLSocket) -> ssl.SSLContext:
        """A client's context from the files as they are now.

        Raises:
            OSError: a file cannot be read, or is no certificate (``ssl.SSLError``).
        """
        context = ssl.create_default_context(cafile=self.ca_file or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.check_hostname
        context.sslsocket_class = socket_class
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file or None)
        return context


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A parsed store URL.

    Attributes:
        kind: what is at the addresses.
        is_tls: connections are encrypted, those to Sentinels too.
        addresses: the server; some nodes of the cluster; the Sentinels. Empty for a unix socket.
        path: of the unix socket.
        database: number, always 0 in a cluster.
        master: the name by which Sentinels know the server.
    """

    kind: Kind
    is_tls: bool
    addresses: tuple[Address, ...]
    path: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = None
    master: str = ""
    sentinel_username: str | None = None
    sentinel_password: str | None = None

    def for_sentinels(self) -> RedisUrl:
        """How to log in at the Sentinels themselves."""
        return RedisUrl(
            "sentinel", self.is_tls, self.addresses, username=self.sentinel_username, password=self.sentinel_password
        )


def parse_redis_url(url: str) -> RedisUrl:
    """Read a URL of one of :data:`REDIS_SCHEMES`.

    ``redis://[user:password@]host[:port][/db]``, ``unix://[user:password@]/path.sock[?db=n]``,
    ``redis+cluster://[user:password@]host[:port][,host[:port]...]``, and
    ``redis+sentinel://[user:password@]host[:port][,...]/master[/db][?sentinel_username=..&sentinel_password=..]``;
    ``rediss`` for TLS.

    Raises:
        ConfigError: it is none of these. Names it, without user and password.
    """
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:  # its text may quote a part of the password
        raise _malformed(url) from None
    if not url.startswith(f"{parts.scheme}://"):
        raise _malformed(url)
    login, _, location = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    if ":" in password or "@" in login:
        raise _malformed(url)
    secure, _, kind = parts.scheme.partition("+")
    known = RedisUrl(
        kind="cluster" if kind == "cluster" else "sentinel" if kind == "sentinel" else "standalone",
        is_tls=secure == "rediss",
        addresses=() if secure == "unix" else _addresses(url, location, kind),
        username=unquote(username) or None,
        password=unquote(password) or None,
        **_path(url, parts.path, location, secure, kind, options),  # type: ignore[arg-type]
    )
    if options or parts.fragment:  # not named: they may be a part of a password that is not percent-encoded
        raise url_error(url, f"has unknown options; there are {', '.join(OPTIONS)}, and # is written %23")
    return known


def _path(
    url: str, path: str, location: str, secure: str, kind: str, options: dict[str, str]
) -> dict[str, str | int | None]:
    """What stands behind the addresses; takes the options it knows out of ``options``."""
    if secure == "unix":
        if location or not path.startswith("/") or path == "/":
            raise url_error(url, "needs the absolute path of a socket, as in unix:///run/valkey.sock")
        return {"path": unquote(path), "database": _database(url, options.pop("db", "0"))}
    names = [unquote(name) for name in path.strip("/").split("/") if name]
    if kind == "cluster":
        if names:
            raise url_error(url, "a cluster has no databases")
        return {}
    if kind == "sentinel":
        if not 1 <= len(names) <= 2:
            raise url_error(url, "needs the master's name, as in redis+sentinel://host:26379/mymaster/0")
        return {
            "master": names[0],
            "database": _database(url, names[1] if len(names) == 2 else "0"),
            "sentinel_username": options.pop("sentinel_username", None),
            "sentinel_password": options.pop("sentinel_password", None),
        }
    if len(names) > 1:
        raise _malformed(url)
    return {"database": _database(url, names[0] if names else options.pop("db", "0"))}


def _database(url: str, text: str) -> int:
    if not text.isdecimal():
        raise url_error(url, "the database must be a number, as in redis://host:6379/0")
    return int(text)


def _addresses(url: str, location: str, kind: str) -> tuple[Address, ...]:
    default = DEFAULT_SENTINEL_PORT if kind == "sentinel" else DEFAULT_PORT
    addresses = []
    for text in location.split(","):
        host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
        if not colon:
            host, port = text, str(default)
        host = host.removeprefix("[").removesuffix("]")
        if not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise _malformed(url)
        addresses.append((host or "localhost", int(port)))
    if not kind and len(addresses) > 1:
        raise url_error(url, "several addresses need redis+cluster or redis+sentinel")
    return tuple(addresses)


def _malformed(url: str) -> ConfigError:
    return url_error(url, "malformed; percent-encode special characters of user and password")

"""The one table of gRPC channel and server arguments, each with its reason."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Final

import grpc

if TYPE_CHECKING:  # else a probe, which opens a channel every few seconds, would read all settings' classes each time
    from alora_serve.rpc.tls import ClientTls

Option = tuple[str, int | str]

DEFAULT_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""Message limit of a server that does not know its model yet: a 128k-token conversation with room to spare."""

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""What a server reads at all, whatever its model: what a context of a million tokens can need.

A request between a model's own limit and this one is read to be refused with the name of its largest field. Beyond it
gRPC refuses, and names nothing; it must, because a message is whole in memory before any of our code sees it.
"""

MESSAGE_OVERHEAD_BYTES: Final = 1024 * 1024
MESSAGE_BYTES_PER_TOKEN: Final = 64

KEEPALIVE_MILLISECONDS: Final = 10_000
KEEPALIVE_TIMEOUT_MILLISECONDS: Final = 5_000
PUBLIC_KEEPALIVE_TIMEOUT_MILLISECONDS: Final = 10_000
SERVER_KEEPALIVE_MILLISECONDS: Final = 30_000

UNREQUESTED_SECONDS: Final = 10 * 60

CONNECTION_AGE_MILLISECONDS: Final = 10 * 60_000
CONNECTION_GRACE_MILLISECONDS: Final = 60 * 60_000


def message_bytes_for_context(context_tokens: int) -> int:
    """The largest request worth reading for a model: a full context as text, templates and handles included.

    A token is about four bytes of text, and four more in a handle; runs of blanks and repeated characters pack up to
    sixteen times as much into one. Never more than :data:`MAX_MESSAGE_BYTES`.
    """
    return min(MAX_MESSAGE_BYTES, MESSAGE_OVERHEAD_BYTES + MESSAGE_BYTES_PER_TOKEN * context_tokens)


def server_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[Option]:
    """Arguments of every server; a larger message is not received."""
    return [
        # With port sharing, a second server binds the same port in silence and takes half of the calls.
        ("grpc.so_reuseport", 0),
        # The receiver knows what it can hold. Answers (handles of long prompts) are bounded by what they answer.
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # However many pings come, the connection stays, and its calls with it: gRPC's own clients also ping for data
        # that they read, to measure bandwidth; one that was busy, and now reads what had come, sends several in a row.
        ("grpc.http2.max_ping_strikes", 0),
        # Idle channels of a router ping too.
        ("grpc.keepalive_permit_without_calls", 1),
        # Notices clients that vanished without closing, so that their streams stop taking places in the batch.
        ("grpc.keepalive_time_ms", SERVER_KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
        # Ours to refuse, with a reason and a time to retry: by default, gRPC ends calls that a busy server did not come
        # to within 30 s in a bare CANCELLED. Those whose clients gave up meanwhile are dropped all the same.
        ("grpc.server_max_unrequested_time_in_server", UNREQUESTED_SECONDS),
        # Old connections are asked to leave, so that clients behind a name or a balancer find new servers ...
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MILLISECONDS),
        # ... but never in the middle of a stream: the grace is longer than the longest generation.
        ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MILLISECONDS),
    ]


def _channel_options(timeout_milliseconds: int, max_message_bytes: int) -> list[Option]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # A silent peer (killed machine, lost network, stopped process) is found within keepalive time and time-out, not
        # within TCP's.
        ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", timeout_milliseconds),
        # While another ping is out (gRPC measures bandwidth by them), that one's time-out rules: a minute by default.
        ("grpc.http2.ping_timeout_ms", timeout_milliseconds),
        # Prefill of a long prompt sends nothing for many pings; the default of 2 would stop pinging then.
        ("grpc.http2.max_pings_without_data", 0),
        # A name's TXT record must not be able to change how calls are balanced or retried; saves a DNS query, too.
        ("grpc.service_config_disable_resolution", 1),
    ]


def internal_options(max_message_bytes: int = DEFAULT_MESSAGE_BYTES) -> list[Option]:
    """Arguments of a channel between two of our services: to one address, never through a proxy."""
    return [
        *_channel_options(KEEPALIVE_TIMEOUT_MILLISECONDS, max_message_bytes),
        # An http_proxy in the environment is for the internet; grpc would send loopback and cluster traffic there.
        ("grpc.enable_http_proxy", 0),
        # The router decides where a call goes next; gRPC retrying underneath would count it twice on one endpoint.
        ("grpc.enable_retries", 0),
        # A dead peer is noticed while no call runs, so that picks avoid it.
        ("grpc.keepalive_permit_without_calls", 1),
        # A restarted worker is found within a second or so; the defaults wait up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Channels share connections (and back-off) by address otherwise, also with a removed and re-added endpoint.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def public_options(
    target: str, max_message_bytes: int = DEFAULT_MESSAGE_BYTES, *, server_name: str = ""
) -> list[Option]:
    """Arguments of a user's channel to the router at ``target``; proxies in the environment are honoured elsewhere.

    ``server_name``: the name in the router's certificate, where it is not that of ``target``.
    """
    return [
        *_channel_options(PUBLIC_KEEPALIVE_TIMEOUT_MILLISECONDS, max_message_bytes),
        # Where a name has several routers, each gets its share of the calls; the default sends all to the first.
        ("grpc.lb_policy_name", "round_robin"),
        # A proxy cannot reach this machine's loopback, yet grpc would send calls to it there.
        ("grpc.enable_http_proxy", 0 if is_this_machine(target) else 1),
        # A router that restarts is found again soon; the defaults wait up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        *_expected(server_name),
    ]


def _expected(server_name: str) -> list[Option]:
    return [("grpc.ssl_target_name_override", server_name)] if server_name else []


_SCHEME: Final = re.compile(r"(dns|ipv4|ipv6):(//[^/]*/)?")


def is_this_machine(target: str) -> bool:
    """Whether a gRPC target, with or without scheme and port, is a loopback address, ``localhost`` or a unix socket."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = target[scheme.end() :] if (scheme := _SCHEME.match(target)) else target
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    else:
        # More than one colon is an IPv6 address without a port.
        host = address.partition(":")[0] if address.count(":") == 1 else address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def internal_channel(
    address: str, max_message_bytes: int = DEFAULT_MESSAGE_BYTES, tls: ClientTls | None = None
) -> grpc.aio.Channel:
    """An asyncio channel to one of our services. ``address`` is ``host:port``; connects when first used.

    Raises:
        ConfigError: a certificate cannot be read.
    """
    options = internal_options(max_message_bytes)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.credentials(), options=options + _expected(tls.server_name))

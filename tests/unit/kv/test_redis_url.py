"""What a Redis URL says."""

from __future__ import annotations

import pytest

from alora_serve.kv.redis_url import RedisUrl, parse_redis_url


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("redis://host", RedisUrl("standalone", is_tls=False, addresses=(("host", 6379),))),
        ("redis://", RedisUrl("standalone", is_tls=False, addresses=(("localhost", 6379),))),
        (
            "rediss://us%2Fer:p%40s%3As@[::1]:7000/3",
            RedisUrl(
                "standalone", is_tls=True, addresses=(("::1", 7000),), database=3, username="us/er", password="p@s:s"
            ),
        ),
        (
            "unix:///run/a%20b.sock?db=2",
            RedisUrl("standalone", is_tls=False, addresses=(), path="/run/a b.sock", database=2),
        ),
        (
            "unix://:secret@/run/s.sock",
            RedisUrl("standalone", is_tls=False, addresses=(), path="/run/s.sock", password="secret"),
        ),
        (
            "redis+cluster://:secret@one,two:7001",
            RedisUrl("cluster", is_tls=False, addresses=(("one", 6379), ("two", 7001)), password="secret"),
        ),
        (
            "rediss+sentinel://one,two:1/kv/4?sentinel_username=watch&sentinel_password=p%26q",
            RedisUrl(
                "sentinel",
                is_tls=True,
                addresses=(("one", 26379), ("two", 1)),
                database=4,
                master="kv",
                sentinel_username="watch",
                sentinel_password="p&q",
            ),
        ),
    ],
)
def test_each_part_of_a_url_is_read(url: str, parsed: RedisUrl) -> None:
    assert parse_redis_url(url) == parsed


def test_sentinels_are_spoken_to_as_oneself_and_not_as_at_the_master() -> None:
    url = parse_redis_url("redis+sentinel://user:secret@one/kv/4?sentinel_password=other")
    assert url.for_sentinels() == RedisUrl("sentinel", is_tls=False, addresses=url.addresses, password="other")

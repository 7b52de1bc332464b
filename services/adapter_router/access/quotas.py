"""Holds tenants to their quotas. One event loop; each router counts for itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from adapter_router.access.rules import AccessRules, Quota
from alora_serve.errors import OverloadedError
from alora_serve.types import Usage

MINUTE_SECONDS: Final = 60.0
DAY_SECONDS: Final = 86_400.0
RETRY_SECONDS: Final = 1.0
"""When to come back after too much at once: about one short answer's time."""

_MANY_BUCKETS: Final = 1024
"""Where those that are full again begin to be dropped."""


class Bucket:
    """Holds up to an amount and refills in a period. May be overdrawn: what a request costs is known at its end."""

    def __init__(self, amount: float, period_seconds: float, clock: Callable[[], float]) -> None:
        self._amount, self._rate = amount, amount / period_seconds
        self._clock = clock
        self._level, self._at = amount, clock()

    @property
    def amount(self) -> float:
        """What it holds when full."""
        return self._amount

    @property
    def is_full(self) -> bool:
        """As a new one is."""
        return self._fill() >= self._amount

    def seconds_until_open(self) -> float:
        """0 while there is something in it."""
        level = self._fill()
        return 0.0 if level > 0 else (1 - level) / self._rate

    def take(self, amount: float) -> None:
        """Take out what was used."""
        self._level = self._fill() - amount

    def _fill(self) -> float:
        now = self._clock()
        self._level = min(self._amount, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level


class Quotas:
    """What every tenant uses now, and has used.

    Args:
        rules: the access file as it is now.
    """

    def __init__(
        self, rules: Callable[[], AccessRules] = AccessRules, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._sequences: Counter[str] = Counter()
        self._queued_tokens: Counter[str] = Counter()
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._many = _MANY_BUCKETS

    @contextmanager
    def hold(self, tenant: str, *, sequences: int, prompt_tokens: int) -> Iterator[None]:
        """Count a request while the block runs.

        Raises:
            OverloadedError: it is more than the tenant may have; says which quota, and when to retry.
        """
        quota = self._quota(tenant)
        self._check("max_sequences", quota.max_sequences, self._sequences[tenant], sequences)
        self._check("max_queued_tokens", quota.max_queued_tokens, self._queued_tokens[tenant], prompt_tokens)
        if quota.tokens_per_minute is not None:
            wait = self._bucket(tenant, "tokens", quota.tokens_per_minute, MINUTE_SECONDS).seconds_until_open()
            if wait:
                raise OverloadedError(
                    f"quota tokens_per_minute of {quota.tokens_per_minute} is used up", retry_after_seconds=wait
                )
        self._count(tenant, sequences, prompt_tokens)
        try:
            yield
        finally:
            self._count(tenant, -sequences, -prompt_tokens)

    def may_store(self, tenant: str) -> bool:
        """New KV of its conversations may be written to the store."""
        limit = self._quota(tenant).stored_bytes_per_day
        return limit is None or not self._bucket(tenant, "stored", limit, DAY_SECONDS).seconds_until_open()

    def charge(self, tenant: str, usage: Usage) -> None:
        """Take what a prefill or an answer cost out of its tenant's buckets."""
        quota = self._quota(tenant)
        if quota.tokens_per_minute is not None:
            used = usage.computed_tokens + usage.generated_tokens
            self._bucket(tenant, "tokens", quota.tokens_per_minute, MINUTE_SECONDS).take(used)
        if quota.stored_bytes_per_day is not None:
            self._bucket(tenant, "stored", quota.stored_bytes_per_day, DAY_SECONDS).take(usage.stored_bytes)

    def _quota(self, tenant: str) -> Quota:
        return self._rules().quota_of(tenant)

    def _bucket(self, tenant: str, what: str, amount: float, period_seconds: float) -> Bucket:
        bucket = self._buckets.get((tenant, what))
        if bucket is None or bucket.amount != amount:
            if len(self._buckets) >= self._many:  # a JWT may name any tenant
                self._buckets = {key: kept for key, kept in self._buckets.items() if not kept.is_full}
                self._many = max(_MANY_BUCKETS, 2 * len(self._buckets))
            bucket = self._buckets[tenant, what] = Bucket(amount, period_seconds, self._clock)
        return bucket

    @staticmethod
    def _check(name: str, limit: int | None, held: int, more: int) -> None:
        if limit is None or held + more <= limit:
            return
        # More than the whole quota never fits, and retrying is pointless.
        retry = RETRY_SECONDS if more <= limit else None
        raise OverloadedError(f"quota {name} of {limit}: {held} in use, {more} asked for", retry_after_seconds=retry)

    def _count(self, tenant: str, sequences: int, prompt_tokens: int) -> None:
        for counter, change in ((self._sequences, sequences), (self._queued_tokens, prompt_tokens)):
            counter[tenant] += change
            if not counter[tenant]:
                del counter[tenant]

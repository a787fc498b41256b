"""Counts what tenants use, and refuses what is over their quota.

In memory of one process, from its start on; called from one thread.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day

from lorasb_server.tenants.api_key import utc_now
from lorasb_server.tenants.errors import QuotaError
from lorasb_server.tenants.quota import Quota

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
RATE = "rate_limit_exceeded"
SPENT = "insufficient_quota"
# When a running request ends or an adapter is deleted is not known: how often to try.
RUNNING_RETRY = 1
ADAPTERS_RETRY = 60


@dataclass
class _Account:
    starts: deque[int] = field(default_factory=deque)  # of the last minute's requests, in ns
    running: int = 0
    day: date | None = None
    tokens: int = 0
    publishing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Meter:
    """`clock` counts nanoseconds and never goes back; `now` is the time of day in UTC."""

    def __init__(
        self,
        clock: Callable[[], int] = time.monotonic_ns,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._clock = clock
        self._now = now
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def request(self, tenant: str, quota: Quota) -> Iterator[None]:
        """One request from its admission to its end; raises QuotaError where it is not admitted.

        No 60 seconds ever see more requests admitted than the quota; refused ones do not count.
        """
        account = self._account(tenant)
        self._check_running(account, quota.concurrent_requests)
        self._check_rate(account, quota.requests_per_minute)
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    def check_tokens(self, tenant: str, quota: Quota) -> None:
        """Raises QuotaError once today's tokens are used up, until UTC midnight."""
        used, limit = self._today(tenant).tokens, quota.tokens_per_day
        if limit is not None and used >= limit:
            now = self._now().astimezone(UTC)
            midnight = datetime.combine(now.date() + timedelta(days=1), time_of_day(), UTC)
            seconds = -((now - midnight) // timedelta(seconds=1))
            raise QuotaError(
                f"tokens a day: found {used} used, at most {limit}; next at UTC midnight",
                seconds,
                SPENT,
            )

    def spend(self, tenant: str, tokens: int) -> None:
        """Count tokens as they are taken in or generated."""
        self._today(tenant).tokens += tokens

    def publishing(self, tenant: str) -> asyncio.Lock:
        """Held while a new name is counted and published, so that no two take the last place."""
        return self._account(tenant).publishing

    def _account(self, tenant: str) -> _Account:
        return self._accounts.setdefault(tenant, _Account())

    def _today(self, tenant: str) -> _Account:
        account, today = self._account(tenant), self._now().astimezone(UTC).date()
        if account.day != today:
            account.day, account.tokens = today, 0
        return account

    def _check_running(self, account: _Account, limit: int | None) -> None:
        if limit is not None and account.running >= limit:
            raise QuotaError(
                f"concurrent requests: found {account.running} running, at most {limit}",
                RUNNING_RETRY,
                RATE,
            )

    def _check_rate(self, account: _Account, limit: int | None) -> None:
        now, starts = self._clock(), account.starts
        while starts and now - starts[0] >= MINUTE:
            starts.popleft()
        if limit is None:
            return
        if len(starts) >= limit:
            wait = starts[len(starts) - limit] + MINUTE - now
            raise QuotaError(
                f"requests a minute: found {len(starts)}, at most {limit}",
                -(-wait // SECOND),
                RATE,
            )
        starts.append(now)


def check_adapters(names: int, quota: Quota) -> None:
    """Raises QuotaError where a tenant with that many adapters may have no new one."""
    if quota.adapters is not None and names >= quota.adapters:
        raise QuotaError(
            f"adapters: found {names}, at most {quota.adapters}; delete one to publish another",
            ADAPTERS_RETRY,
            SPENT,
        )

"""Quotas: what is admitted, what is refused, and whether Retry-After tells the truth."""

import math
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb_server.tenants.errors import QuotaError
from lorasb_server.tenants.meter import MINUTE, SECOND, Meter, check_adapters
from lorasb_server.tenants.quota import Quota


class Time:
    """A clock in nanoseconds and the time of day, both moved by hand."""

    def __init__(self) -> None:
        self.ns = 0
        self.day = datetime(2026, 1, 1, 12, tzinfo=UTC)

    def meter(self) -> Meter:
        return Meter(lambda: self.ns, lambda: self.day)


def admitted(meter: Meter, quota: Quota, tenant: str = "a") -> int:
    """0 for an admitted request that has ended, else its Retry-After."""
    try:
        with meter.request(tenant, quota):
            return 0
    except QuotaError as error:
        return error.retry_after


@given(
    limit=st.integers(1, 5),
    steps=st.lists(st.integers(0, 70 * SECOND) | st.integers(0, 3 * SECOND), max_size=60),
)
def test_no_minute_sees_more_than_the_quota_and_a_refusal_says_until_when(
    limit: int, steps: list[int]
) -> None:
    time, quota = Time(), Quota(requests_per_minute=limit)
    meter, starts = time.meter(), []
    for step in steps:
        time.ns += step
        wait = admitted(meter, quota)
        if not wait:
            starts.append(time.ns)
            continue
        earliest = starts[-limit] + MINUTE
        assert wait == math.ceil((earliest - time.ns) / SECOND)  # ns below 2**53: exact
        before = time.ns
        time.ns = earliest - 1
        assert admitted(meter, quota)
        time.ns = before + wait * SECOND
        assert not admitted(meter, quota)
        starts.append(time.ns)
    for at, start in enumerate(starts[limit:]):
        assert start - starts[at] >= MINUTE


def test_refused_requests_and_other_tenants_use_nothing_up() -> None:
    time, quota = Time(), Quota(requests_per_minute=2)
    meter = time.meter()
    assert [admitted(meter, quota) for _ in range(4)] == [0, 0, 60, 60]
    assert admitted(meter, quota, "b") == 0
    time.ns = MINUTE
    assert [admitted(meter, quota) for _ in range(3)] == [0, 0, 60]
    assert admitted(meter, Quota()) == 0
    assert admitted(meter, Quota(requests_per_minute=3)) == 0
    assert admitted(meter, Quota(requests_per_minute=1)) == 60


def test_requests_count_as_running_until_they_end_however_they_end() -> None:
    meter, quota = Time().meter(), Quota(concurrent_requests=2, requests_per_minute=5)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(meter.request("a", quota))
        for _ in range(9):  # refused for what runs: the minute's quota is not used up
            with pytest.raises(QuotaError, match="found 2 running, at most 2") as refused:
                running.enter_context(meter.request("a", quota))
            assert refused.value.retry_after == 1
        assert admitted(meter, quota, "b") == 0
    with pytest.raises(RuntimeError), meter.request("a", quota):
        raise RuntimeError
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(meter.request("a", quota))
    assert admitted(meter, quota) == 60


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 100))
def test_tokens_are_refused_from_the_limit_on(spent: list[int], limit: int) -> None:
    meter, quota = Time().meter(), Quota(tokens_per_day=limit)
    total = 0
    for tokens in spent:
        if total < limit:
            meter.check_tokens("a", quota)
        else:
            with pytest.raises(QuotaError, match=f"found {total} used, at most {limit}"):
                meter.check_tokens("a", quota)
        meter.spend("a", tokens)
        total += tokens
    meter.check_tokens("b", quota)


@given(st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31), timezones=st.just(UTC)))
def test_tokens_come_back_at_utc_midnight_and_not_before(now: datetime) -> None:
    time, quota = Time(), Quota(tokens_per_day=1)
    time.day = now.astimezone(timezone_of(now))
    meter = time.meter()
    meter.spend("a", 1)
    with pytest.raises(QuotaError) as refused:
        meter.check_tokens("a", quota)
    wait = timedelta(seconds=refused.value.retry_after)
    time.day = now + wait
    meter.check_tokens("a", quota)
    assert now < datetime.combine(time.day.date(), datetime.min.time(), UTC) <= time.day
    assert time.day - datetime.combine(time.day.date(), datetime.min.time(), UTC) < timedelta(
        seconds=1
    )


def timezone_of(now: datetime) -> timezone:
    return timezone(timedelta(hours=now.minute % 24 - 12))


def test_adapters() -> None:
    check_adapters(1, Quota(adapters=2))
    check_adapters(99, Quota())
    for found in (2, 3):
        with pytest.raises(QuotaError, match=f"found {found}, at most 2"):
            check_adapters(found, Quota(adapters=2))

"""Attempts, waits and time limits of calls to a store, on a clock of the test's."""

from collections.abc import Callable

import pytest

from lorasb_runtime.adapters.retry import Retry, RetryConfig
from lorasb_runtime.errors import NotFoundError, StoreError


class Time:
    """Each attempt takes `cost` seconds; sleeping takes what it says."""

    def __init__(self, cost: float = 0.0) -> None:
        self.now = 0.0
        self.cost = cost
        self.slept: list[float] = []
        self.allowed: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def retry(self, config: RetryConfig, draw: float = 1.0) -> Retry:
        return Retry(config, clock=self.clock, sleep=self.sleep, draw=lambda: draw)

    def failing(self, errors: list[Exception]) -> Callable[[float], str]:
        def work(seconds: float) -> str:
            self.allowed.append(seconds)
            self.now += min(self.cost, seconds)
            if errors:
                raise errors.pop(0)
            return "done"

        return work


CONFIG = RetryConfig(5, 10.0, 30.0, first_wait=1.0, longest_wait=3.0)


def passing(count: int) -> list[Exception]:
    return [StoreError(f"failure {i}", transient=True) for i in range(count)]


def test_waits_grow_up_to_a_limit_and_are_drawn_at_random() -> None:
    time = Time()
    retry = time.retry(CONFIG)
    assert retry.run(time.failing(passing(4))) == "done"
    assert time.slept == [1.0, 2.0, 3.0, 3.0] and retry.count == 4
    half = Time()
    half.retry(CONFIG, 0.5).run(half.failing(passing(2)))
    assert half.slept == [0.5, 1.0]


def test_the_last_attempts_error_is_raised() -> None:
    time = Time()
    with pytest.raises(StoreError, match="failure 4"):
        time.retry(CONFIG).run(time.failing(passing(9)))
    assert len(time.allowed) == 5


@pytest.mark.parametrize("error", [StoreError("denied"), NotFoundError("no such adapter")])
def test_what_will_not_pass_is_tried_once(error: Exception) -> None:
    time = Time()
    with pytest.raises(type(error)):
        time.retry(CONFIG).run(time.failing([error]))
    assert len(time.allowed) == 1 and time.slept == []


def test_all_attempts_end_in_the_time_they_have_together() -> None:
    time = Time(cost=10.0)
    with pytest.raises(StoreError, match="failure 2"):
        time.retry(CONFIG).run(time.failing(passing(9)))
    assert time.allowed == [10.0, 10.0, 7.0]  # what the attempts and waits before have left
    assert time.now <= 30.0

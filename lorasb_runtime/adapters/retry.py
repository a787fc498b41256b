"""Another attempt after a transient failure, with waits that grow and are drawn at random."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lorasb_runtime.errors import StoreError

T = TypeVar("T")


@dataclass(frozen=True)
class RetryConfig:
    """Seconds throughout: of one attempt, of all attempts with their waits, and of the waits."""

    attempts: int = 4
    attempt_seconds: float = 60.0
    overall_seconds: float = 120.0
    first_wait: float = 0.1
    longest_wait: float = 5.0


class Retry:
    """Runs work until it succeeds, fails for good or has had its time. Safe for many threads.

    The wait before attempt n + 1 is drawn evenly from 0 to `first_wait` * 2^n (full jitter), so
    that many replicas do not come back at one moment.
    """

    def __init__(
        self,
        config: RetryConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.config = config or RetryConfig()
        self._clock = clock
        self._sleep = sleep
        self._draw = draw
        self._lock = threading.Lock()
        self._count = 0

    @property
    def count(self) -> int:
        """Attempts so far that were not the first one."""
        return self._count

    def run(self, work: Callable[[float], T]) -> T:
        """What `work` returns; it is told how many seconds it may take.

        Only a StoreError that is transient leads to another attempt; the last one is raised.
        """
        config = self.config
        end = self._clock() + config.overall_seconds
        for attempt in range(config.attempts):
            left = max(end - self._clock(), 0.001)
            try:
                return work(min(config.attempt_seconds, left))
            except StoreError as error:
                longest = min(config.longest_wait, config.first_wait * 2**attempt)
                wait = self._draw() * longest
                last = attempt + 1 == config.attempts
                if last or not error.transient or self._clock() + wait >= end:
                    raise
            self.add()
            self._sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def add(self) -> None:
        """Count one more attempt that `run` did not make itself."""
        with self._lock:
            self._count += 1

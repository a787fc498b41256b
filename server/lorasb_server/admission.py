"""How many sequences may be inside at once: running, waiting, or getting ready to. Pure Python.

Used from the event loop alone, where looking and entering are one step, so that no two requests
take the last place.
"""

import math
import time
from collections import deque
from collections.abc import Callable

from lorasb_server.errors import FieldError
from lorasb_server.refusals import QueueFullError

WINDOW = 60.0  # seconds that are looked back on
REMEMBERED = 256  # ends that are remembered at most
LONGEST_RETRY = 60


class Admission:
    """Admits while no more than `running` + `waiting` sequences are inside."""

    def __init__(
        self, running: int, waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.inside = 0
        self._most = running + waiting
        self._clock = clock
        self._busy_since = clock()
        self._ends: deque[float] = deque(maxlen=REMEMBERED)

    def enter(self, count: int) -> "Places":
        """Places for so many sequences.

        Raises QueueFullError where they are not free, FieldError where they never will be.
        """
        if count > self._most:
            raise FieldError("n", f"n: found {count} sequences in all, at most {self._most} fit")
        if self.inside + count > self._most:
            missing = self.inside + count - self._most
            raise QueueFullError(self.inside, count, self._most, self._seconds_for(missing))
        if not self.inside:
            self._busy_since = self._clock()
        self.inside += count
        return Places(self, count)

    def leave(self, count: int) -> None:
        """Count sequences out; through `Places` alone."""
        self.inside -= count
        self._ends.extend([self._clock()] * count)

    def _seconds_for(self, places: int) -> int:
        """How long so many places take to become free, at the pace of the last minute.

        Where none did, at least as long again as has been waited.
        """
        now = self._clock()
        since = max(self._busy_since, now - WINDOW)
        ends = [end for end in self._ends if end >= since]
        if len(ends) == REMEMBERED:
            since = ends[0]
        seconds = places * (now - since) / len(ends) if ends else now - since
        return min(LONGEST_RETRY, max(1, math.ceil(seconds)))


class Places:
    """The places of one request; each of its sequences leaves one when it ends."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission = admission
        self._count = count

    def leave(self) -> None:
        self._give(1)

    def close(self) -> None:
        """Leave all that are left."""
        self._give(self._count)

    def _give(self, count: int) -> None:
        count = min(count, self._count)
        if count:
            self._count -= count
            self._admission.leave(count)

"""What a loader counts, for a metrics endpoint to read."""

import threading
from bisect import bisect_left
from dataclasses import dataclass

FETCH_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class LoaderStats:
    """Counts since the start, but `cached` and `cached_bytes`, which are of this moment.

    hits: look-ups answered from host memory; misses: the others (requests that wait for one
    flight are one look-up). negative_hits: unknown names answered without the store. fetches:
    adapter files read from the store, failures: flights that ended in an error, retries:
    repeated attempts at the store. stale_served: answers that the store did not confirm in time.
    pack_hits, disk_hits: misses answered by those. swaps: versions made current here, and
    changes of a known name seen in the store. fetch_counts: how many fetches took at most
    FETCH_SECONDS[i], the last entry all of them; fetch_seconds: what they took together.
    """

    hits: int = 0
    misses: int = 0
    negative_hits: int = 0
    fetches: int = 0
    failures: int = 0
    retries: int = 0
    bytes_fetched: int = 0
    cached_bytes: int = 0
    cached: int = 0
    disk_hits: int = 0
    pack_hits: int = 0
    stale_served: int = 0
    swaps: int = 0
    fetch_seconds: float = 0.0
    fetch_counts: tuple[int, ...] = ()


class LoaderCounters:
    """The counters behind LoaderStats by their names. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._fetches = [0] * (len(FETCH_SECONDS) + 1)
        self._seconds = 0.0

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def fetched(self, seconds: float) -> None:
        """Count one fetch by how long it took."""
        with self._lock:
            self._seconds += seconds
            for index in range(bisect_left(FETCH_SECONDS, seconds), len(self._fetches)):
                self._fetches[index] += 1

    def stats(self, *, retries: int, cached: int, cached_bytes: int) -> LoaderStats:
        """A snapshot, with what others count."""
        with self._lock:
            return LoaderStats(
                **self._counts,
                retries=retries,
                cached=cached,
                cached_bytes=cached_bytes,
                fetch_seconds=self._seconds,
                fetch_counts=tuple(self._fetches),
            )

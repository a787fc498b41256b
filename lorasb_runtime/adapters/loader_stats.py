"""What a loader counts, for a metrics endpoint to read."""

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class LoaderStats:
    """Counts since the start, but `cached` and `cached_bytes`, which are of this moment.

    hits: look-ups answered from host memory; misses: the others (requests that wait for one
    flight are one look-up). negative_hits: unknown names answered without the store. fetches:
    adapter files read from the store, failures: flights that ended in an error, retries:
    repeated attempts at the store. stale_served: answers that the store did not confirm in time.
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


class LoaderCounters:
    """The counters behind LoaderStats by their names. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def stats(self, *, retries: int, cached: int, cached_bytes: int) -> LoaderStats:
        """A snapshot, with what others count."""
        with self._lock:
            return LoaderStats(
                **self._counts, retries=retries, cached=cached, cached_bytes=cached_bytes
            )

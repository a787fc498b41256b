"""The loader's settings, frozen."""

from dataclasses import dataclass
from pathlib import Path

from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.retry import RetryConfig


@dataclass(frozen=True)
class LoaderConfig:
    """Times are seconds.

    refresh: a change in the store is seen after that at the most; also how long an unknown name
    is remembered as such. stale: how long a version that is known and cached is served while the
    store fails to confirm it. timeout: what a request waits for the store at the most. patience:
    what it waits when it could have such a version instead. fetches: reads from the store at once.
    names: how many names, and how many unknown ones, are remembered. pins: adapters whose last
    served version stays in host memory.
    """

    refresh: float = 1.0
    stale: float = 300.0
    timeout: float = 30.0
    patience: float = 1.0
    fetches: int = 16
    names: int = 65536
    cache_bytes: int = 1 << 30
    pins: frozenset[AdapterName] = frozenset()
    disk_cache: Path | None = None
    disk_cache_bytes: int = 4 << 30

    def retry_config(self) -> RetryConfig:
        """For the loader's store: a request may need two calls of it, each of a few attempts."""
        return RetryConfig(attempt_seconds=self.timeout / 3, overall_seconds=self.timeout / 2)

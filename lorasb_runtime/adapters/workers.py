"""The threads that wait for the store, so that a store that hangs takes nobody else's."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from lorasb_runtime.errors import StoreError

P = ParamSpec("P")
T = TypeVar("T")

CALLS = 8  # changes and listings at once


class StoreWorkers:
    """One pool for adapters' flights and one for all else, so that neither starves the other."""

    def __init__(self, fetches: int, timeout: float) -> None:
        self._timeout = timeout
        self._fetches = ThreadPoolExecutor(fetches, thread_name_prefix="lorasb-fetch")
        self._calls = ThreadPoolExecutor(CALLS, thread_name_prefix="lorasb-store")

    def fetch(self, work: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have `work` done; it keeps its result itself."""
        self._fetches.submit(work, *args, **kwargs)

    async def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns. Raises StoreError when that takes too long."""
        running = self._calls.submit(work, *args, **kwargs)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(running), self._timeout)
        except TimeoutError:
            raise StoreError(
                f"the adapter store did not answer within {self._timeout:g} s; a change that was "
                "asked for may or may not have been made"
            ) from None

    def close(self) -> None:
        """Start nothing more; what runs ends by itself."""
        self._fetches.shutdown(wait=False, cancel_futures=True)
        self._calls.shutdown(wait=False, cancel_futures=True)

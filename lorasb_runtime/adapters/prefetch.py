"""Loads many adapters in the background, a few at once, so that requests find a free fetch."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lorasb_runtime.adapters.names import AdapterName

logger = logging.getLogger(__name__)


def prefetch(
    names: list[AdapterName], begin: Callable[[AdapterName], "Future[Any]"], at_once: int
) -> "Future[int]":
    """Begin each name's look-up, at most `at_once` at a time; gives how many succeeded."""
    result: Future[int] = Future()

    def run() -> None:
        running: deque[Future[Any]] = deque()
        loaded = 0
        for name in names:
            if len(running) >= at_once:
                loaded += _succeeded(running.popleft())
            running.append(begin(name))
        result.set_result(loaded + sum(_succeeded(lookup) for lookup in running))

    threading.Thread(target=run, name="lorasb-prefetch", daemon=True).start()
    return result


def _succeeded(lookup: "Future[Any]") -> bool:
    error = lookup.exception()
    if error is not None:
        logger.warning("prefetch: %s", error)
    return error is None

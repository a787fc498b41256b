"""Says once in the log when a store stops and when it starts to confirm versions again."""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

QUIET_SECONDS = 60.0  # between two outages that are logged


class Outage:
    """Whether cached versions are being served because the store does not confirm them."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self._url = url
        self._clock = clock
        self._on = False
        self._logged: float | None = None

    def begin(self, reason: str) -> None:
        if self._on:
            return
        self._on = True
        now = self._clock()
        if self._logged is None or now - self._logged >= QUIET_SECONDS:
            self._logged = now
            logger.warning(
                "store %s: serving cached versions that it does not confirm: %s", self._url, reason
            )

    def end(self) -> None:
        if self._on:
            self._on = False
            logger.info("store %s: it answers again", self._url)

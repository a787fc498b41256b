"""Whether the server takes requests, and which it is answering. Event loop only."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum

from lorasb_server.exchange import Exchange
from lorasb_server.refusals import StoppingError


class Phase(StrEnum):
    """What `/ready` tells; in this order, never back."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"


class Lifecycle:
    """From loading through ready to stopping, and the exchanges that are open."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.open: set[Exchange] = set()
        self._closed = asyncio.Event()

    def loaded(self) -> None:
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def stop(self) -> None:
        self.phase = Phase.STOPPING

    @contextmanager
    def answering(self, exchange: Exchange) -> Iterator[None]:
        """Counts the exchange as open while the block runs, and gives back what it holds."""
        self.open.add(exchange)
        try:
            with exchange.held:
                yield
        finally:
            self.open.remove(exchange)
            self._closed.set()

    def end_all(self) -> None:
        """Have every open answer end with an error."""
        for exchange in self.open:
            exchange.end(StoppingError())

    async def idle(self, seconds: float) -> None:
        """Wait until nothing is being answered, so long at the most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.open:
                    self._closed.clear()
                    await self._closed.wait()

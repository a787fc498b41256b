"""One HTTP request while it is answered: its id, when it must end, and what is told of it."""

import asyncio
import math
import re
import time
import uuid
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import Headers

from lorasb_runtime.errors import LorasbError
from lorasb_server.admission import Places
from lorasb_server.errors import FieldError, outcome_of
from lorasb_server.refusals import DeadlineError

T = TypeVar("T")

TIMEOUT_HEADER = "X-Request-Timeout"
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


@dataclass(eq=False)
class Exchange:
    """`stop` holds the error that ends the answer before its time, once there is one.

    `begun` says that output exists; `places` are those in the queue, of one that generates.
    `outcome` is set where the status does not tell it. `facts` go into the log line and the span:
    never a text that the request or the answer holds. `held` is given back at the end.
    """

    id: str
    stop: "asyncio.Future[LorasbError]"
    arrived: float = field(default_factory=time.monotonic)
    begun: bool = False
    places: Places | None = None
    status: int | None = None
    outcome: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def of(cls, headers: Headers) -> "Exchange":
        """A new one, under the client's X-Request-Id if that is one, and sane."""
        given = headers.getlist("x-request-id")
        sane = len(given) == 1 and SANE_ID.fullmatch(given[0])
        return cls(
            given[0] if sane else uuid.uuid4().hex, asyncio.get_running_loop().create_future()
        )

    @property
    def seconds(self) -> float:
        """Since it arrived."""
        return time.monotonic() - self.arrived

    def end(self, error: LorasbError) -> None:
        """Have the answer end with this error, unless it ends already."""
        if not self.stop.done():
            self.stop.set_result(error)

    def expire(self, seconds: float) -> None:
        """Have the answer end so many seconds after the request arrived."""

        def late() -> None:
            self.end(DeadlineError(seconds, begun=self.begun))

        left = max(0.0, seconds - self.seconds)
        self.held.callback(asyncio.get_running_loop().call_later(left, late).cancel)

    async def run(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when it has to end or when the client goes.

        Raises the error to end with, or ClientGoneError.
        """
        task = asyncio.create_task(work)
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((task, gone, self.stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self.stop.done():
                self.outcome = outcome_of(self.stop.result())
                raise self.stop.result()
            raise ClientGoneError
        finally:
            for pending in (task, gone):
                pending.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


def exchange_of(request: Request) -> Exchange:
    """The one that the middleware has made for this request."""
    exchange: Exchange = request.state.exchange
    return exchange


def allowed_seconds(headers: Headers, most: float | None) -> float | None:
    """How long a request may take: X-Request-Timeout, in seconds, and `most` at the most.

    Raises FieldError for a header that is no such number.
    """
    given = headers.getlist(TIMEOUT_HEADER)
    if not given:
        return most
    try:
        (seconds,) = map(float, given)
        if not 0 < seconds < math.inf:
            raise ValueError
    except ValueError:
        found = ", ".join(given)
        raise FieldError(
            TIMEOUT_HEADER, f"{TIMEOUT_HEADER}: found {found!r:.80}, expected seconds above 0"
        ) from None
    return seconds if most is None else min(seconds, most)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

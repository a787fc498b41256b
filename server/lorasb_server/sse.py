"""Server-sent events: one JSON object each, `[DONE]` at the end, errors as an event.

An object that has a `type` is sent under it as the event's name, as the Responses API does.
"""

import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorasb_runtime.errors import LorasbError
from lorasb_server.errors import error_body, internal_body

logger = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """Sends events as they come; closes their source when the client goes away."""

    def __init__(self, first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]) -> None:
        self._rest = rest
        self._events = _events(first, rest)
        super().__init__(
            self._events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._rest.aclose()  # a client gone at once leaves the events unstarted


async def event_stream(payloads: AsyncGenerator[dict[str, Any], None]) -> EventStream:
    """A response for `payloads`, whose first one is awaited here.

    So an error before any output still has its own HTTP status.
    """
    try:
        first = await anext(payloads)
    except BaseException:
        await payloads.aclose()
        raise
    return EventStream(first, payloads)


async def _events(
    first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(rest):
        yield _event(first)
        try:
            async for payload in rest:
                yield _event(payload)
        except LorasbError as error:
            yield _event(error_body(error))
        except Exception:
            logger.exception("a stream failed")
            yield _event(internal_body())
        yield "data: [DONE]\n\n"


def _event(payload: dict[str, Any]) -> str:
    name = f"event: {payload['type']}\n" if "type" in payload else ""
    return f"{name}data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"

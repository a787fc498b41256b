"""ASGI middleware: a bound on JSON bodies."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class SizeLimit:
    """Answers 413 to a POST whose body exceeds `max_bytes`, at once or while it is read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        read = 0
        announced = Headers(scope=scope).get("content-length", "")
        over = announced.isdigit() and int(announced) > self._max

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if over or read > self._max:
                raise HTTPException(413, f"body too large: at most {self._max} bytes")
            return message

        await self._app(scope, limited, send)

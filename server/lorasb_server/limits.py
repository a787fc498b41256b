"""ASGI middleware: a bound on JSON bodies, and a count of requests by outcome."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorasb_server.generate import ClientGoneError
from lorasb_server.metrics import Metrics

CLIENT_GONE = 499


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


class RequestLog:
    """Counts every request by route and status; one whose client left counts as 499."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientGoneError:
            status = CLIENT_GONE
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path=path, status=str(status)).inc()

"""ASGI middleware around all routes: a request's id, its log line, its count and its span."""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING
from urllib.parse import quote

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorasb_server.errors import error_response, internal_body
from lorasb_server.exchange import ClientGoneError, Exchange
from lorasb_server.lifecycle import Lifecycle, Phase
from lorasb_server.logs import REQUEST_ID
from lorasb_server.probes import METRICS, PROBES, route_path
from lorasb_server.refusals import StoppingError

if TYPE_CHECKING:
    from lorasb_server.metrics import Metrics
    from lorasb_server.traces import Traces

logger = logging.getLogger("lorasb_server.requests")

CLIENT_GONE = 499
UNASKED = (*PROBES, METRICS)  # asked by machines: answered to the end, and no news
LONGEST_PATH = 200  # characters of it that are logged


class Exchanges:
    """Makes the Exchange of every request; while the server stops it answers nothing new.

    Whatever fails without an answer of its own is told in the log and answered with a 500.
    """

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle,
        metrics: "Metrics | None" = None,
        traces: "Traces | None" = None,
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange.of(Headers(scope=scope))
        REQUEST_ID.set(exchange.id)  # of this request's own task: there is nothing to reset
        scope.setdefault("state", {})["exchange"] = exchange

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.id
            await send(message)

        asked = route_path(scope) not in UNASKED
        with self._lifecycle.answering(exchange), self._span(exchange, scope):
            try:
                if asked and self._lifecycle.phase is Phase.STOPPING:
                    exchange.outcome = "refused"
                    await error_response(StoppingError())(scope, receive, sending)
                else:
                    await self._app(scope, receive, sending)
            except ClientGoneError:
                exchange.status = CLIENT_GONE
            except Exception:
                logger.exception("%s %s failed", scope["method"], _shown_path(scope))
                exchange.outcome = "error"
                if exchange.status is None:
                    await JSONResponse(internal_body(), 500)(scope, receive, sending)
            finally:
                self._tell(exchange, scope, logging.INFO if asked else logging.DEBUG)

    def _span(self, exchange: Exchange, scope: Scope) -> AbstractContextManager[None]:
        return nullcontext() if self._traces is None else self._traces.span(exchange, scope)

    def _tell(self, exchange: Exchange, scope: Scope, level: int) -> None:
        status = exchange.status or CLIENT_GONE
        exchange.outcome = exchange.outcome or _outcome(status)
        if self._metrics is not None:
            path = getattr(scope.get("route"), "path", "other")
            labels = {"path": path, "status": str(status), "outcome": exchange.outcome}
            self._metrics.requests.labels(**labels).inc()
        if not logger.isEnabledFor(level):
            return
        method, path, seconds = scope["method"], _shown_path(scope), round(exchange.seconds, 4)
        facts = {
            "method": method,
            "path": path,
            "status": status,
            "outcome": exchange.outcome,
            "seconds": seconds,
            **exchange.facts,
        }
        if "caller" in scope["state"]:
            facts["tenant"] = scope["state"]["caller"].tenant
        line = "%s %s: %d, %s in %.3f s"
        logger.log(
            level, line, method, path, status, exchange.outcome, seconds, extra={"facts": facts}
        )


def _shown_path(scope: Scope) -> str:
    """Without what follows a question mark, and on one line."""
    return quote(scope["path"])[:LONGEST_PATH]


def _outcome(status: int) -> str:
    if status == CLIENT_GONE:
        return "abort"
    return "ok" if status < 400 else "refused" if status < 500 else "error"

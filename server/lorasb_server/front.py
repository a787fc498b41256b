"""What answers from the moment that the server listens: the application once it is loaded."""

from starlette.types import ASGIApp, Receive, Scope, Send

from lorasb_server.errors import error_response
from lorasb_server.exchanges import Exchanges
from lorasb_server.lifecycle import Lifecycle
from lorasb_server.probes import PROBES, route_path, status_response
from lorasb_server.refusals import LoadingError


class Front:
    """`app` None: it is being loaded, so probes are told so and all else gets 503.

    `root_path` is where a proxy has the server, empty for none.
    """

    def __init__(self, lifecycle: Lifecycle, root_path: str) -> None:
        self.app: ASGIApp | None = None
        self._lifecycle = lifecycle
        self._root_path = root_path
        self._loading = Exchanges(self._answer, lifecycle)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["root_path"] = self._root_path
        await (self.app or self._loading)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        path = route_path(scope)
        if path in PROBES:
            response = status_response("alive" if path == "/health" else self._lifecycle.phase)
        else:
            scope["state"]["exchange"].outcome = "refused"
            response = error_response(LoadingError())
        await response(scope, receive, send)

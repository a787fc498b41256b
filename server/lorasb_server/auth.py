"""Who asks, for every route by construction: nothing but OPEN_PATHS is reached without a caller."""

from contextlib import ExitStack
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorasb_runtime.errors import LorasbError
from lorasb_server.errors import error_response
from lorasb_server.playground.routes import PAGE
from lorasb_server.probes import PROBES, route_path
from lorasb_server.tenants.caller import Caller, Role, anyone
from lorasb_server.tenants.errors import InvalidKeyError
from lorasb_server.tenants.key_ring import KeyRing
from lorasb_server.tenants.meter import Meter

# The page holds no data of its own; a root path without its slash is redirected to the page.
OPEN_PATHS = ("", *PROBES, *PAGE)
POLICY_VIOLATION = 1008
API_KEY = HTTPBearer(
    scheme_name="ApiKey",
    description="Needed where the server has a keys file.",
    auto_error=False,
)


class Auth:
    """ASGI middleware: finds the caller, counts the request on its quota until it has ended.

    Without `keys` everyone is the admin of the default namespace.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, meter: Meter) -> None:
        self._app = app
        self._keys = keys
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # no route speaks anything else
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        elif route_path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as running:
            try:
                caller = self._caller(Headers(scope=scope))
                running.enter_context(self._meter.request(caller.tenant, caller.quota))
            except LorasbError as error:
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
            await self._app(scope, receive, send)

    def _caller(self, headers: Headers) -> Caller:
        if self._keys is None:
            return anyone()
        given = headers.getlist("authorization")
        if len(given) > 1:
            raise InvalidKeyError(f"Authorization: found {len(given)} headers, expected one")
        return self._keys.identify(given[0] if given else None)


async def caller_of(request: Request, _: Annotated[object, Depends(API_KEY)]) -> Caller:
    """The caller that Auth found; API_KEY is for the OpenAPI document alone."""
    caller: Caller = request.state.caller
    return caller


AnyCaller = Annotated[Caller, Depends(caller_of)]


async def _publisher(caller: AnyCaller) -> Caller:
    caller.require(Role.PUBLISH)
    return caller


async def _admin(caller: AnyCaller) -> Caller:
    caller.require(Role.ADMIN)
    return caller


Publisher = Annotated[Caller, Depends(_publisher)]
Admin = Annotated[Caller, Depends(_admin)]

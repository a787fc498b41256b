"""What machines ask that run the server, and which paths they do it by."""

from fastapi.responses import JSONResponse, Response
from starlette.types import Scope

PROBES = ("/health", "/ready")
METRICS = "/metrics"
READY = ("alive", "ready")  # what all is well with


def route_path(scope: Scope) -> str:
    """The request's path without the root path, whether or not a proxy has taken that off.

    It is what Starlette's router compares with its routes.
    """
    path: str = scope["path"]
    rest = path.removeprefix(scope.get("root_path", ""))
    return rest if rest == "" or rest.startswith("/") else path


def status_response(status: str) -> Response:
    """A probe's answer."""
    return JSONResponse({"status": status}, 200 if status in READY else 503)

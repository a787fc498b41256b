"""Which pages of other origins may call the server from a browser."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

METHODS = ("GET", "POST", "PUT", "DELETE")
TOLD_HEADERS = ("X-Request-Id", "Retry-After")  # a page sees these of an answer


class Cors(CORSMiddleware):
    """Outside of Auth, as a browser's preflight bears no key."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=TOLD_HEADERS,
        )

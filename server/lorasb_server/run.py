"""Runs the application with uvicorn until it is told to stop."""

import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from lorasb_runtime.errors import EngineError, InputError

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 10  # what running requests get to finish in after SIGINT or SIGTERM


def run_server(
    app: FastAPI, host: str, port: int, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM; port 0 takes a free one.

    `on_ready` is told the URL once connections are answered; by default it is logged. Raises
    InputError when the address cannot be listened on, EngineError when the engine does not start.
    """
    with _listen(host, port) as listener:
        address = listener.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        server = _Server(app, f"http://{shown}:{address[1]}", on_ready or _log)
        try:
            server.run(sockets=[listener])
        except SystemExit:  # uvicorn's, after it has logged why
            raise EngineError("the server did not start; the log says why") from None


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, url: str, on_ready: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        super().__init__(config)
        self._url = url
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready(self._url)


def _log(url: str) -> None:
    logger.info("lorasb: serving on %s", url)


def _listen(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Named TCP, or asyncio leaves Nagle on: small writes would then wait for receipts, 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        if listener is not None:
            listener.close()
        raise InputError(f"cannot listen on {host} port {port}: {error}") from None
    return listener

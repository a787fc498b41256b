"""Runs the application with uvicorn until it is told to stop."""

import logging
import socket

import uvicorn
from fastapi import FastAPI

from lorasb_runtime.errors import InputError

logger = logging.getLogger(__name__)


def run_server(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; port 0 takes a free one. Logs the address once ready.

    Raises InputError when the address cannot be listened on.
    """
    listener = _listen(host, port)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
    with listener:
        logger.info("serving on http://%s:%d", shown, address[1])
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error}") from None
    return listener

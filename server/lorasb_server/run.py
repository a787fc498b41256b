"""Listens, loads the application in a thread, and serves it with uvicorn until told to stop."""

import asyncio
import gc
import logging
import multiprocessing
import os
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from contextvars import Context
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from lorasb_runtime.errors import EngineError, InputError, LorasbError
from lorasb_server.cors import Cors
from lorasb_server.front import Front
from lorasb_server.lifecycle import Lifecycle
from lorasb_server.settings import ListenConfig

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2  # what clients get to take the last events of ended answers in

Load = Callable[[Lifecycle], FastAPI]


def run_server(load: Load, listen: ListenConfig) -> None:
    """Serve what `load` gives until SIGINT or SIGTERM; probes are answered while it loads.

    Raises InputError when the address cannot be listened on or TLS not be set up, and what `load`
    or the application's start raises; EngineError for what they did not mean to.
    """
    with _listen(listen.host, listen.port) as listener:
        address = listener.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        scheme = "http" if listen.tls is None else "https"
        server = _Server(load, listen, f"{scheme}://{shown}:{address[1]}")
        server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure


def leave(status: int) -> NoReturn:
    """End this process now, whatever its threads are at: loading, or waiting for a store.

    An engine's own processes end with it.
    """
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    os._exit(status)


class _Server(uvicorn.Server):
    """`failure` is why it ended, where that was not a signal."""

    def __init__(self, load: Load, listen: ListenConfig, url: str) -> None:
        self.failure: LorasbError | OSError | None = None
        self._load = load
        self._lifecycle = Lifecycle()
        self._front = Front(self._lifecycle, listen.root_path)
        self._drain_timeout = listen.drain_timeout
        self._url = url
        self._running = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._signalled = False
        super().__init__(_uvicorn_config(self._front, listen))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        logger.info("lorasb: listening on %s, loading", self._url)
        self._tasks.append(asyncio.create_task(self._open()))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._running.aclose()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the process at once."""
        if self._signalled:
            leave(128 + sig)
        self._signalled = True
        if self.started:
            # In a context of its own: it is about no request, whichever the signal came upon.
            self._loop.call_soon_threadsafe(self._begin_to_drain, context=Context())
        else:
            self.should_exit = True

    async def _open(self) -> None:
        """Load the application and start it."""
        try:
            app = await _in_thread(self._load_for_good)
            await self._running.enter_async_context(app.router.lifespan_context(app))
        except (LorasbError, OSError) as error:
            self.failure = error
        except Exception:
            logger.exception("the server did not start")
            self.failure = EngineError("the server did not start; the log says why")
        else:
            self._front.app = app
            logger.info("lorasb: serving on %s", self._url)
        self.should_exit = self.should_exit or self.failure is not None

    def _load_for_good(self) -> FastAPI:
        """The application; collections of garbage need not look at what it was loaded with.

        There are half a million objects, and a full collection of them stops everything for 0.4 s.
        """
        app = self._load(self._lifecycle)
        gc.collect()
        gc.freeze()
        return app

    def _begin_to_drain(self) -> None:
        self._tasks.append(asyncio.create_task(self._drain()))

    async def _drain(self) -> None:
        """Refuse what is new, let what runs end in its time, then end it."""
        lifecycle, seconds = self._lifecycle, self._drain_timeout
        lifecycle.stop()
        logger.info(
            "lorasb: stopping; what runs (requests: %d) gets %g s; another signal ends it at once",
            len(lifecycle.open),
            seconds,
        )
        await lifecycle.idle(seconds)
        if lifecycle.open:
            logger.warning("lorasb: ending what still runs (requests: %d)", len(lifecycle.open))
            lifecycle.end_all()
            await lifecycle.idle(FLUSH_SECONDS)
        self.should_exit = True


def _uvicorn_config(front: Front, listen: ListenConfig) -> uvicorn.Config:
    """Raises InputError for certificates that cannot be used."""
    tls, origins = listen.tls, listen.cors_origins
    config = uvicorn.Config(
        Cors(front, origins) if origins else front,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    if tls is not None:
        config.ssl_certfile, config.ssl_keyfile = tls.certfile, tls.keyfile
        config.ssl_keyfile_password = tls.keyfile_password
        if tls.ca_certs is not None:
            config.ssl_ca_certs, config.ssl_cert_reqs = str(tls.ca_certs), ssl.CERT_REQUIRED
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        assert tls is not None
        files = [str(path) for path in (tls.certfile, tls.keyfile, tls.ca_certs) if path]
        raise InputError(f"TLS: cannot use {', '.join(files)} ({error})") from None
    return config


async def _in_thread(work: Callable[[], FastAPI]) -> FastAPI:
    """What `work` gives, from a thread that keeps nobody from leaving."""
    result: Future[FastAPI] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="lorasb-load", daemon=True).start()
    return await asyncio.wrap_future(result)


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

"""A server in the main thread, where signals arrive, and its client in another."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import httpx
from fake_engine import wait_until

from lorasb_server.run import Load, run_server
from lorasb_server.settings import ListenConfig

Stop = Callable[[], None]


def serve_here(
    load: Load, client: Callable[[str, Stop], None], drain_timeout: float = 30.0
) -> None:
    """Runs a server until `client` has ended or has stopped it.

    It is called with the URL once the server listens, and with what stops it as an operator would.
    Nothing else may end the server: a signal that came too late would end this process.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    failures: list[BaseException] = []
    told: list[int] = []

    def stop() -> None:
        if not told:
            told.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    def listens() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    def run() -> None:
        try:
            wait_until(listens)
            client(url, stop)
        except BaseException as error:
            failures.append(error)
        finally:
            stop()

    thread = threading.Thread(target=run)
    thread.start()
    run_server(load, ListenConfig(port=port, drain_timeout=drain_timeout))
    thread.join()
    if failures:
        raise failures[0]

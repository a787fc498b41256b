"""An HTTP proxy in front of a store, on a free port of 127.0.0.1, that fails as it is told."""

import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("hang", "truncated", "damaged", "500", "reset")


class FaultyProxy(ThreadingHTTPServer):
    """`fault`: one of FAULTS or "" for none; `only` limits it to paths that contain it.

    requests: the paths asked for since the start, failed ones included.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target  # host:port
        self.fault = ""
        self.only = ""
        self.requests: list[str] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def heal(self) -> None:
        self.fault, self.only = "", ""
        self.closing.set()  # lets go those that hang
        self.closing = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def do_GET(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        self.server.requests.append(self.path)
        fault = self.server.fault if self.server.only in self.path else ""
        if fault == "hang":
            self.server.closing.wait(60)
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "500":
            self._answer(500, {}, b"internal error")
        else:
            self._forward(body, fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self, body: bytes, fault: str) -> None:
        connection = http.client.HTTPConnection(self.server.target, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in _HOP}
        if fault == "truncated" and data:
            self._answer(response.status, headers, data, sent=len(data) // 2)
            self.close_connection = True
        elif fault == "damaged" and response.status < 300 and data:
            self._answer(response.status, headers, data[:-1] + bytes([data[-1] ^ 1]))
        else:
            self._answer(response.status, headers, data)

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if self.command != "HEAD":
            self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])

    def log_message(self, *_: object) -> None:
        """Quiet."""


_HOP = ("connection", "content-length", "transfer-encoding", "date", "server")


@contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy to `target` (host:port), running until the block ends."""
    with FaultyProxy(target) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.heal()
            proxy.shutdown()
            thread.join()

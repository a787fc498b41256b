"""A store in a repository of a Hugging Face hub, as a hub on 127.0.0.1 would serve it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.retry import Retry, RetryConfig
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import ConflictError, NotFoundError, StoreError

ALICE = parse_name("alice")
FILES = "/org/repo/resolve/main/"


class Hub(ThreadingHTTPServer):
    folder: Path
    exists = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = self.server.folder / path.removeprefix(FILES)
        if not self.server.exists:
            self.answer(404, b"{}", "RepoNotFound")
        elif path == "/api/models/org/repo":
            self.answer(200, json.dumps({"id": "org/repo", "sha": "0" * 40}).encode())
        elif path.startswith(FILES) and file.is_file():
            self.answer(200, file.read_bytes())
        else:
            self.answer(404, b"", "EntryNotFound")

    do_HEAD = do_GET

    def answer(self, status: int, data: bytes, error: str = "") -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Handler) as server:
        server.folder = tmp_path
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_repository_is_read_and_not_written(hub: Hub) -> None:
    folder = AdapterStore(str(hub.folder / "adapters"))
    version = folder.publish(ALICE, b"one")
    store = AdapterStore("hf://org/repo/adapters", Retry(RetryConfig(1)))
    assert store.current(ALICE) == version
    assert store.fetch(ALICE, version) == b"one"
    second = folder.publish(ALICE, b"two")
    assert store.current(ALICE) == second  # no cache between us and the hub
    with pytest.raises(NotFoundError):
        store.current(parse_name("nobody"))
    with pytest.raises(ConflictError, match="an hf store, which is read only"):
        store.publish(ALICE, b"three")


def test_a_repository_that_is_gone_is_no_unknown_name_and_may_come_back(hub: Hub) -> None:
    version = AdapterStore(str(hub.folder)).publish(ALICE, b"one")
    store = AdapterStore("hf://org/repo", Retry(RetryConfig(1)))
    hub.exists = False
    with pytest.raises(StoreError):
        store.current(ALICE)
    hub.exists = True
    assert store.current(ALICE) == version

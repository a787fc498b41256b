"""The application with a keys file on the fake engine, and a client for each kind of caller."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import httpx
from fake_engine import FakeEngine, adapter_bytes, folder_loader, served, tiny_basis
from fastapi import FastAPI

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_server.app import create_app
from lorasb_server.settings import ServerConfig
from lorasb_server.tenants.api_key import new_key
from lorasb_server.tenants.caller import Role
from lorasb_server.tenants.key_ring import KeyRing
from lorasb_server.tenants.keys_file import edit_keys
from lorasb_server.tenants.quota import Quota

BASIS = tiny_basis()
CONFIG = ServerConfig("pico", ("org/pico",))
WHO = {
    "acme": ("acme", Role.PUBLISH),
    "acme-reads": ("acme", Role.INFER),
    "beta": ("beta", Role.PUBLISH),
    "root": ("default", Role.ADMIN),
}


@dataclass(frozen=True)
class Site:
    """A served application with a keys file; `api[who]` asks with a key of WHO's."""

    app: FastAPI
    url: str
    api: dict[str, httpx.Client]
    store: Path

    def say(self, who: str, model: str, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": "x", **more}
        return self.api[who].post("/v1/completions", json=body)

    def put(self, who: str, name: str, value: float = 1.0) -> httpx.Response:
        return self.api[who].put(f"/v1/adapters/{name}", content=adapter_bytes(BASIS, value))

    def models(self, who: str) -> list[str]:
        return [m["id"] for m in self.api[who].get("/v1/models").json()["data"]]

    def listed(self, who: str) -> list[str]:
        return [card["name"] for card in self.api[who].get("/v1/adapters").json()["data"]]


@contextmanager
def opened(
    folder: Path,
    engine: FakeEngine,
    quota: Quota | None = None,
    loader: AdapterLoader | None = None,
) -> Iterator[Site]:
    """A site in `folder`; namespace `common` is shared, `quota` is the tenant acme's."""
    file = folder / "keys.json"
    made = {who: new_key(tenant, role) for who, (tenant, role) in WHO.items()}
    for record, _ in made.values():
        edit_keys(file, methodcaller("with_key", record), create=True)
    edit_keys(file, lambda keys: keys.with_shared("common"))
    if quota is not None:
        edit_keys(file, lambda keys: keys.with_quota("acme", quota))
    loader = loader or folder_loader(folder / "store", BASIS)
    app = create_app(engine, loader, CONFIG, KeyRing(file))
    with served(app) as url, ExitStack() as clients:
        api = {
            who: clients.enter_context(
                httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"})
            )
            for who, (_, key) in made.items()
        }
        yield Site(app, url, api, folder / "store")


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error

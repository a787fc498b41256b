"""The adapter routes on a folder store: swaps, roll-backs, limits, and a damaged store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, adapter_bytes, folder_loader, served, tiny_basis
from openai import NotFoundError, OpenAI

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.storage.adapter_file import version_of
from lorasb_runtime.storage.basis_file import Basis
from lorasb_server.app import create_app
from lorasb_server.settings import ServerConfig


@pytest.fixture
def basis() -> Basis:
    return tiny_basis()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def api(engine: FakeEngine, basis: Basis, store: Path) -> Iterator[httpx.Client]:
    app = create_app(engine, folder_loader(store, basis), ServerConfig("pico", ("org/pico",)))
    with served(app) as url, httpx.Client(base_url=url) as api:
        yield api


@pytest.fixture
def client(api: httpx.Client) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def put(api: httpx.Client, name: str, data: bytes) -> dict[str, Any]:
    body: dict[str, Any] = api.put(f"/v1/adapters/{name}", content=data).raise_for_status().json()
    return body


def say(client: OpenAI, model: str, **more: Any) -> str:
    return client.completions.create(model=model, prompt="x", **more).choices[0].text


def test_an_adapter_is_what_its_routes_say(api: httpx.Client, client: OpenAI, basis: Basis) -> None:
    data = adapter_bytes(basis, 1.0)
    assert api.get("/v1/adapters").json()["data"] == []
    assert put(api, "team/alice", data) == {
        "name": "team/alice",
        "version": version_of(data),
        "previous": None,
        "basis": basis.digest,
        "bytes": len(data),
    }
    listed = api.get("/v1/adapters").json()
    card = api.get("/v1/adapters/team/alice").json()
    assert listed["basis"] == card.pop("basis") == basis.digest
    assert listed["data"] == [card]
    assert card.pop("modified")
    assert card == {
        "name": "team/alice",
        "versions": 1,
        "version": version_of(data),
        "bytes": len(data),
        "current": True,
    }
    models = client.models.list().data
    assert [m.id for m in models] == ["pico", "team/alice"]
    assert [(m.owned_by, (m.model_extra or {})["parent"]) for m in models] == [
        ("lorasb", None),
        ("lorasb", "pico"),
    ]
    assert client.models.retrieve("org/pico").id == "pico"


def test_the_next_request_has_the_version_put_last(
    api: httpx.Client, client: OpenAI, basis: Basis, engine: FakeEngine
) -> None:
    one, two = adapter_bytes(basis, 1.0), adapter_bytes(basis, 2.0)
    assert put(api, "a", one)["previous"] is None
    first = say(client, "a")
    assert first == say(client, "pico", extra_body={"adapter": "a"}) != say(client, "pico")
    assert put(api, "a", two)["previous"] == version_of(one)
    assert say(client, "a") != first
    versions = api.get("/v1/adapters/a/versions").json()["data"]
    assert {(v["version"], v["current"]) for v in versions} == {
        (version_of(one), False),
        (version_of(two), True),
    }
    back = api.post("/v1/adapters/a/rollback")
    assert back.json() == {"name": "a", "version": version_of(one)}
    assert say(client, "a") == first
    api.post("/v1/adapters/a/rollback", json={"version": version_of(two)}).raise_for_status()
    assert engine.requests[-1].adapter and engine.requests[-1].adapter.version == version_of(one)
    assert say(client, "a") != first
    assert api.delete("/v1/adapters/a").json() == {"name": "a", "deleted": True}
    with pytest.raises(NotFoundError):
        say(client, "a")


def test_bad_uploads_change_nothing(api: httpx.Client, basis: Basis) -> None:
    good = adapter_bytes(basis, 1.0)
    version = put(api, "a", good)["version"]
    large = b"\0" * (4 * basis.size + (1 << 20) + 1)

    def pieces() -> Iterator[bytes]:
        yield from (large[i : i + 65536] for i in range(0, len(large), 65536))

    for content, status in (
        (b"", 400),
        (good[:-1], 400),
        (adapter_bytes(tiny_basis(1), 1.0), 422),
        (large, 413),
        (pieces(), 413),
    ):
        response = api.put("/v1/adapters/a", content=content)
        assert response.status_code == status, response.text
    for name in ("pico", "default/pico", "org/pico"):
        assert api.put(f"/v1/adapters/{name}", content=good).status_code == 409
    assert api.get("/v1/adapters/a").json()["version"] == version
    assert len(api.get("/v1/adapters").json()["data"]) == 1


def test_roll_backs_that_cannot_be(api: httpx.Client, basis: Basis) -> None:
    put(api, "a", adapter_bytes(basis, 1.0))
    for body, status in (
        ({}, 409),
        ({"version": "f" * 64}, 404),
        ({"version": "x"}, 400),
        ({"version": 1}, 400),
        ({"nope": 1}, 400),
    ):
        response = api.post("/v1/adapters/a/rollback", json=body)
        assert response.status_code == status, response.text
    assert api.post("/v1/adapters/b/rollback").status_code == 404


def test_a_damaged_adapter_harms_no_other_and_a_put_repairs_it(
    api: httpx.Client, client: OpenAI, basis: Basis, store: Path
) -> None:
    for name in ("a", "b"):
        put(api, name, adapter_bytes(basis, 1.0))
    (store / "default" / "a" / "current").write_text("junk")
    assert [card["name"] for card in api.get("/v1/adapters").json()["data"]] == ["b"]
    for path in ("/v1/adapters/a", "/v1/adapters/a/versions", "/v1/models/a"):
        assert api.get(path).status_code == 503
    assert api.post("/v1/completions", json={"model": "a", "prompt": "x"}).status_code == 503
    fresh = put(api, "a", adapter_bytes(basis, 2.0))
    assert api.get("/v1/adapters/a").json()["version"] == fresh["version"]
    assert say(client, "a")


def test_an_adapter_of_another_basis_is_shown_as_such_and_refused(
    api: httpx.Client, store: Path
) -> None:
    other = tiny_basis(1)
    folder_loader(store, other).publish(parse_name("a"), adapter_bytes(other, 1.0))
    assert api.get("/v1/adapters/a").json()["basis"] == other.digest
    refused = api.post("/v1/completions", json={"model": "a", "prompt": "x"})
    assert refused.status_code == 422 and other.digest in refused.text


def test_without_a_basis_there_are_no_adapters(engine: FakeEngine) -> None:
    with served(create_app(engine, None, ServerConfig("pico"))) as url:
        for method, path in (
            ("GET", ""),
            ("GET", "/a"),
            ("PUT", "/a"),
            ("DELETE", "/a"),
            ("GET", "/a/versions"),
            ("POST", "/a/rollback"),
        ):
            response = httpx.request(method, f"{url}/v1/adapters{path}")
            assert response.status_code == 404
            assert "no basis" in response.json()["error"]["message"]
        assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["pico"]

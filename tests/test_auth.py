"""No route answers without a key, but for those that say so."""

import asyncio
from typing import Any

import httpx
from fake_engine import FakeEngine
from fastapi import FastAPI
from fastapi.routing import APIRoute
from sites import Site, error_of
from starlette.routing import Route

from lorasb_server.auth import OPEN_PATHS
from lorasb_server.playground.routes import PAGE


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of every route, those that FastAPI adds by itself included."""
    assert all(isinstance(route, Route | APIRoute) for route in app.routes)
    return [
        (method, route.path.replace("{name:path}", "acme/a"))
        for route in app.routes
        if isinstance(route, Route | APIRoute)
        for method in sorted(route.methods or ())
    ]


def test_no_route_answers_without_a_key(site: Site, engine: FakeEngine) -> None:
    site.put("acme", "a").raise_for_status()
    routes = routes_of(site.app)
    assert {path for _, path in routes} >= {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/acme/a",
        "/v1/adapters", "/v1/adapters/acme/a", "/v1/adapters/acme/a/rollback", "/tokenize",
        "/detokenize", "/metrics", "/health", "/ready", "/docs", "/openapi.json",
    }  # fmt: skip
    others = [
        ("GET", "/nothing"),
        ("OPTIONS", "/v1/models"),
        ("GET", "/health/"),
        ("GET", "//ready"),
    ]
    for method, path in (*routes, *others):
        answers = [
            httpx.request(method, f"{site.url}{path}", headers=headers)
            for headers in ({}, {"Authorization": "Bearer none"})
        ]
        for answer in answers:
            if path in OPEN_PATHS:
                assert answer.status_code == 200, (method, path)
            else:
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert error_of(answer)["code"] == "invalid_api_key"
                    assert error_of(answer)["type"] == "authentication_error"
    assert set(OPEN_PATHS) == {"", "/health", "/ready", *PAGE}
    assert {path.rpartition("/")[0] for path in PAGE} == {"", "/playground"}
    assert not engine.requests
    assert site.listed("acme") == ["a"]


def test_two_keys_at_once_are_none(site: Site) -> None:
    key = site.api["acme"].headers["authorization"]
    answer = httpx.get(
        f"{site.url}/v1/models", headers=[("Authorization", key), ("Authorization", key)]
    )
    assert answer.status_code == 401 and "found 2 headers" in error_of(answer)["message"]


def test_a_websocket_is_closed(site: Site) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("nothing is read of it")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/health", "headers": []}
    asyncio.run(site.app(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]

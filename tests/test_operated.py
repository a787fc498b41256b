"""A server as an operator runs it: TLS, keys, a proxy, pages, JSON logs, traces and metrics.

One process, told by file, environment and flags.
"""

import json
import os
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bases import random_adapter, random_basis
from collector import attributes, collecting
from fake_engine import wait_until
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from operated import PASSWORD, Operated, certificates
from serving import lorasb, running

from lorasb_runtime.storage.adapter_file import serialize_adapter
from lorasb_runtime.storage.basis_file import save_basis

SECRET = "Xylophone-Quagmire"
ORIGIN = "https://app.example"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPT: dict[str, Any] = {"model": "pico", "prompt": SECRET, "max_tokens": 4}


@pytest.fixture(scope="module")
def server(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("operated")
    trusting = certificates(folder)
    basis = random_basis(pico)
    save_basis(basis, folder / "basis.safetensors")
    key = lorasb("keys", "create", folder / "keys.json", "--role", "admin").stdout.strip()
    (folder / "lorasb.toml").write_text(
        f"""
        basis = "{folder}/basis.safetensors"
        api-keys = "{folder}/keys.json"
        root-path = "/llm"
        cors-origin = ["{ORIGIN}", "https://other.example"]
        ssl-certfile = "{folder}/cert.pem"
        ssl-keyfile = "{folder}/key.pem"
        ssl-ca-certs = "{folder}/ca.pem"
        log-format = "text"
        """
    )
    log = folder / "log"
    with collecting() as collector:
        env = {
            **os.environ,
            "LORASB_CONFIG": str(folder / "lorasb.toml"),
            "LORASB_SSL_KEYFILE_PASSWORD": PASSWORD,
            "LORASB_LOG_FORMAT": "json",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        words = ("--adapters", folder / "store", "--log-level", "debug")
        with (
            running(log, pico, *words, env=env, verify=trusting) as process,
            httpx.Client(
                base_url=f"{process.url}/llm",
                verify=trusting,
                headers={"Authorization": f"Bearer {key}"},
                timeout=30,
            ) as api,
        ):
            api.put("/v1/adapters/a", content=serialize_adapter(random_adapter(basis, 1)))
            yield Operated(process.url, api, trusting, log, collector)
            api.get("/v1/models", headers={"X-Request-Id": "last"})
        assert collector.span("last") is not None  # what was left when it stopped was sent
    assert [json.loads(line) for line in log.read_text().splitlines()][-1]["level"] == "info"
    assert PASSWORD not in log.read_text() and key.split("-")[2] not in log.read_text()


def test_only_those_with_a_certificate_get_in(server: Operated) -> None:
    assert server.url.startswith("https://")
    assert server.api.get("/v1/models").status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    nameless = ssl.create_default_context(cafile=server.log.parent / "ca.pem")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health", verify=nameless)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health".replace("https", "http"))


def test_a_proxy_may_take_its_path_off_or_not(server: Operated) -> None:
    with httpx.Client(base_url=server.url, verify=server.trusting) as nobody:
        for prefix in ("", "/llm"):
            assert nobody.get(f"{prefix}/health").status_code == 200
            assert nobody.get(f"{prefix}/ready").json() == {"status": "ready"}
            assert nobody.get(f"{prefix}/v1/models").status_code == 401
        page = nobody.get("/llm", follow_redirects=True)
        assert (page.status_code, page.url.path) == (200, "/llm/")
        for path in ("/llmhealth", "/llm/llm/health", "/health/x"):
            assert nobody.get(path).status_code == 401
    key = server.api.headers["authorization"]
    bare = httpx.get(
        f"{server.url}/v1/models", verify=server.trusting, headers={"Authorization": key}
    )
    assert bare.json() == server.api.get("/v1/models").json()
    assert server.api.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_pages_of_named_origins_may_call(server: Operated) -> None:
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-request-timeout",
    }
    with httpx.Client(base_url=server.url, verify=server.trusting) as browser:
        allowed = browser.options("/v1/completions", headers={"Origin": ORIGIN, **preflight})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "x-request-timeout" in allowed.headers["access-control-allow-headers"]
        stranger = {"Origin": "https://evil.example", **preflight}
        refused = browser.options("/v1/completions", headers=stranger)
        assert "access-control-allow-origin" not in refused.headers
        keyless = browser.get("/v1/models", headers={"Origin": ORIGIN})
    answer = server.api.get("/v1/models", headers={"Origin": ORIGIN})
    for response, status in ((keyless, 401), (answer, 200)):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-Id" in response.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in server.api.get("/v1/models").headers


def test_a_request_has_an_id_and_one_line(server: Operated) -> None:
    body = {**PROMPT, "model": "a"}
    answer = server.api.post("/v1/completions", json=body, headers={"X-Request-Id": "my-id:1"})
    assert answer.headers["x-request-id"] == "my-id:1"
    (line,) = server.lines("my-id:1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert line["message"].startswith("POST /llm/v1/completions: 200, ok in ")
    usage = answer.json()["usage"]
    expected = {
        "level": "info",
        "method": "POST",
        "path": "/llm/v1/completions",
        "status": 200,
        "outcome": "ok",
        "tenant": "default",
        "model": "pico",
        "adapter": "a",
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": 4,
        "cached_tokens": 0,
        "finish_reasons": ["length"],
    }
    assert {key: line.get(key) for key in expected} == expected
    for given in ("", "two words", "x" * 129, "é", '"quoted"'):
        headers = [("X-Request-Id", given.encode())]
        made = server.api.get("/v1/models", headers=headers).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", made)
        assert len(server.lines(made)) == 1
    server.api.get("/ready", headers={"X-Request-Id": "probe"})
    assert [line["level"] for line in server.lines("probe")] == ["debug"]


BAD: list[dict[str, Any]] = [
    {"prompt": [SECRET, 1]},
    {"prompt": SECRET, SECRET: 1},
    {"prompt": {SECRET: SECRET}},
    {"model": f"{SECRET}/{SECRET}"},
    {"model": SECRET},
    {"adapter": [{"name": SECRET}]},
    {"adapter": {"inline": SECRET}},
    {"prompt": SECRET * 100},
    {"stop": [SECRET, 1]},
    {"suffix": SECRET},
    {"user": SECRET, "n": 999},
    {"structured_outputs": {"grammar": SECRET}},
    {"structured_outputs": {"regex": f"({SECRET}"}},
]


def test_nothing_that_is_said_gets_into_the_log_or_a_span(server: Operated) -> None:
    said = {"role": "user", "content": SECRET}
    chat = {"model": "pico", "messages": [said], "max_tokens": 300, "user": SECRET}
    api = server.api
    for stream in (False, True):
        assert api.post("/v1/completions", json={**PROMPT, "stream": stream}).status_code == 200
        chatted = api.post("/v1/chat/completions", json={**chat, "max_tokens": 4, "stream": stream})
        assert chatted.status_code == 200
        for bad in BAD:
            refused = api.post("/v1/completions", json={**PROMPT, "stream": stream, **bad})
            assert 400 <= refused.status_code < 500
    tool = {"type": "function", "function": {"name": "f", "description": SECRET}}
    assert api.post("/v1/chat/completions", json={**chat, "tools": [tool], "max_tokens": 4})
    assert api.post("/v1/chat/completions", json=chat).status_code == 400
    assert api.post("/v1/chat/completions", content=f'{{"{SECRET}'.encode()).status_code == 400
    assert api.post("/tokenize", json={"prompt": SECRET}).status_code == 200
    soon = {"X-Request-Timeout": "0.001"}
    late = {**PROMPT, "max_tokens": 200, "ignore_eos": True}
    assert api.post("/v1/completions", json=late, headers=soon).status_code == 504
    with pytest.raises(httpx.ReadTimeout):
        api.post("/v1/completions", json={**late, "n": 100}, timeout=0.05)
    wait_until(lambda: '"status": 499' in server.log.read_text())
    last = api.get(f"/v1/models?q={SECRET}").headers["x-request-id"]
    server.span(last)
    assert len(server.lines(last)) == 1
    assert SECRET not in server.log.read_text()
    assert not any(SECRET in str(span) for span in server.collector.spans)
    asked = [json.loads(line).get("status") for line in server.log.read_text().splitlines()]
    assert {200, 400, 404, 499, 504} <= set(asked)


def test_a_span_tells_what_was_done(server: Operated) -> None:
    parent = f"00-{TRACE}-{PARENT}-01"
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    headers = {"traceparent": parent, "X-Request-Id": "traced"}
    usage = server.api.post("/v1/chat/completions", json=body, headers=headers).json()["usage"]
    span = server.span("traced")
    assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT
    assert (span.name, span.kind) == ("POST /v1/chat/completions", Span.SPAN_KIND_SERVER)
    assert span.end_time_unix_nano > span.start_time_unix_nano
    assert attributes(span) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "lorasb.request_id": "traced",
        "lorasb.outcome": "ok",
        "lorasb.adapter": "a",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lorasb",
        "gen_ai.request.model": "pico",
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert server.lines("traced")[0]["trace_id"] == TRACE
    own = server.span(server.api.get("/v1/nothing").headers["x-request-id"])
    assert not own.parent_span_id and own.trace_id.hex() != TRACE
    assert own.status.code == 0
    late = {**PROMPT, "max_tokens": 200, "ignore_eos": True}
    soon = {"X-Request-Timeout": "0.001", "X-Request-Id": "late"}
    server.api.post("/v1/completions", json=late, headers=soon)
    failed = server.span("late")
    assert attributes(failed)["error.type"] == "timeout" and failed.status.code == 2
    assert server.collector.services == {"lorasb"}

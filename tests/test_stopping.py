"""From the first moment that a server listens to its end: probes, loading, signals."""

import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, wait_until
from fastapi import FastAPI
from openai import APIError, OpenAI
from serving import LORASB, running
from serving_here import Stop, serve_here

from lorasb_runtime.errors import EngineError, InputError
from lorasb_server.app import create_app
from lorasb_server.lifecycle import Lifecycle
from lorasb_server.run import Load, run_server
from lorasb_server.settings import ListenConfig, ServerConfig

FAKE: dict[str, Any] = {
    "model": "pico",
    "prompt": "x",
    "max_tokens": 200,
    "ignore_eos": True,
    "stream": True,
}
REAL: dict[str, Any] = {**FAKE, "model": "pico-long", "max_tokens": 16000}


def loading(engine: FakeEngine, gate: threading.Event | None = None) -> Load:
    def load(lifecycle: Lifecycle) -> FastAPI:
        if gate is not None:
            assert gate.wait(30)
        return create_app(engine, None, ServerConfig("pico"), lifecycle=lifecycle)

    return load


def status_of(url: str, path: str) -> tuple[int, str]:
    response = httpx.get(f"{url}{path}")
    return response.status_code, response.json()["status"]


def wait_for(url: str, status: str) -> None:
    wait_until(lambda: httpx.get(f"{url}/ready").json()["status"] == status)


def check_refused(url: str, code: str) -> None:
    """What is asked now gets 503, when to come again, and OpenAI's error object."""
    for response in (
        httpx.get(f"{url}/v1/models"),
        httpx.post(f"{url}/v1/completions", json={**FAKE, "stream": False}),
    ):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-request-id"]
        error = response.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("server_error", code, None)


def payloads(lines: Iterator[str]) -> list[str]:
    return [line.removeprefix("data: ") for line in lines if line]


def test_while_it_loads_probes_are_answered_and_clients_come_again(engine: FakeEngine) -> None:
    gate = threading.Event()
    refused = threading.Event()

    def client(url: str, stop: Stop) -> None:
        assert status_of(url, "/health") == (200, "alive")
        assert status_of(url, "/ready") == (503, "loading")
        check_refused(url, "loading")
        threading.Timer(0.5, gate.set).start()
        with OpenAI(base_url=f"{url}/v1", api_key="none") as openai:
            answer = openai.completions.with_raw_response.create(
                model="pico", prompt="x", max_tokens=3
            )
        if answer.retries_taken:
            refused.set()
        assert answer.parse().choices[0].finish_reason == "length"
        assert status_of(url, "/ready") == (200, "ready")

    serve_here(loading(engine, gate), client)
    assert refused.is_set() and not engine.started


def test_a_failure_to_load_ends_the_server(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(lifecycle: Lifecycle) -> FastAPI:
        raise InputError("the model is no model")

    def oddly(lifecycle: Lifecycle) -> FastAPI:
        raise RuntimeError("nobody expected this")

    def no_device() -> None:
        raise RuntimeError("no device")

    listen = ListenConfig(port=0)
    with pytest.raises(InputError, match="the model is no model"):
        run_server(no_model, listen)
    with pytest.raises(EngineError, match="the server did not start; the log says why"):
        run_server(oddly, listen)
    monkeypatch.setattr(engine, "start", no_device)
    with pytest.raises(EngineError, match="the server did not start; the log says why"):
        run_server(loading(engine), listen)
    assert "nobody expected this" in caplog.text and "no device" in caplog.text


def test_a_stop_waits_for_what_runs_and_takes_nothing_new(engine: FakeEngine) -> None:
    engine.pace = 0.01

    def client(url: str, stop: Stop) -> None:
        wait_for(url, "ready")
        with httpx.stream("POST", f"{url}/v1/completions", json=FAKE) as response:
            lines = response.iter_lines()
            next(lines)
            stop()
            wait_for(url, "stopping")
            assert status_of(url, "/ready") == (503, "stopping")
            assert status_of(url, "/health") == (200, "alive")
            assert httpx.get(f"{url}/metrics").status_code == 200
            check_refused(url, "stopping")
            assert httpx.get(f"{url}/v1/models").headers["connection"] == "close"
            *_, last, done = payloads(lines)
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"

    serve_here(loading(engine), client)
    assert (engine.finished, engine.aborted) == (1, 0)


def test_a_client_that_does_not_read_holds_nobody_up(engine: FakeEngine) -> None:
    engine.pace = 0.05

    def client(url: str, stop: Stop) -> None:
        wait_for(url, "ready")
        with httpx.stream("POST", f"{url}/v1/completions", json=FAKE):
            stop()
            wait_until(lambda: engine.open == 0)

    serve_here(loading(engine), client, drain_timeout=0.2)
    assert (engine.finished, engine.aborted) == (0, 1)


def ask_in_background(url: str, answers: list[httpx.Response]) -> threading.Thread:
    def ask() -> None:
        body = {**REAL, "stream": False}
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_what_outlasts_the_drain_is_ended_with_an_error(pico_long: Path, tmp_path: Path) -> None:
    answers: list[httpx.Response] = []
    with running(tmp_path / "log", pico_long, "--drain-timeout", 0.5) as server:
        url = server.url
        with (
            httpx.stream("POST", f"{url}/v1/completions", json=REAL) as response,
            OpenAI(base_url=f"{url}/v1", api_key="none") as client,
        ):
            lines = response.iter_lines()
            next(lines)
            seen = iter(
                client.completions.create(
                    model="pico-long",
                    prompt="y",
                    max_tokens=16000,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
            )
            next(seen)
            asking = ask_in_background(url, answers)
            three = "\nlorasb_sequences_running 3.0\n"
            wait_until(lambda: three in httpx.get(f"{url}/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            *_, last, done = payloads(lines)
            with pytest.raises(APIError, match="the server is stopping"):
                list(seen)
        asking.join(timeout=30)
        assert server.process.wait(timeout=30) == 0
    error = json.loads(last)["error"]
    assert (error["code"], error["type"], done) == ("stopping", "server_error", "[DONE]")
    assert answers[0].status_code == 503 and answers[0].headers["retry-after"]
    assert answers[0].json()["error"]["code"] == "stopping"


def test_a_second_signal_ends_it_at_once(pico_long: Path, tmp_path: Path) -> None:
    with (
        running(tmp_path / "log", pico_long) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=REAL) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        wait_for(server.url, "stopping")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) == 128 + signal.SIGINT
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)


def test_a_signal_while_it_loads_ends_it(pico_long: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*LORASB, "serve", str(pico_long), "--port", "0"]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            wait_until(lambda: "listening on" in log.read_text(), 60)
            found = re.search(r"listening on (http\S+),", log.read_text())
            assert found and status_of(found[1], "/ready") == (503, "loading")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
    assert "serving on" not in log.read_text()

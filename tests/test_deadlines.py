"""A request's time: once it is over its sequences end, and whoever asked is told what to do."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, adapter_bytes, served, tiny_basis, wait_until
from openai import InternalServerError, OpenAI
from sites import error_of

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.config import EngineConfig, SchedulerConfig
from lorasb_runtime.engines.torch.build import load_engine
from lorasb_runtime.engines.torch.engine import TorchEngine
from lorasb_runtime.errors import LorasbError
from lorasb_server.app import create_app
from lorasb_server.interleave import interleave
from lorasb_server.refusals import DeadlineError
from lorasb_server.settings import ServerConfig

LONG: dict[str, Any] = {"model": "pico", "ignore_eos": True, "temperature": 0}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {**LONG, "prompt": "x", "max_tokens": 16000},
    "/v1/chat/completions": {**LONG, "messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {**LONG, "input": "x"},
}
PLAIN = BODIES["/v1/completions"]
SOON = {"X-Request-Timeout": "0.4"}


@pytest.fixture(scope="module")
def engine(pico_long: Path) -> TorchEngine:
    scheduler = SchedulerConfig(max_num_seqs=2)
    return load_engine(pico_long, None, EngineConfig(dtype="float32", scheduler=scheduler))


@pytest.fixture(scope="module")
def url(engine: TorchEngine) -> Iterator[str]:
    with served(create_app(engine, None, ServerConfig("pico"))) as url:
        yield url


def payloads(text: str) -> list[Any]:
    """Of an event stream, which must end as such."""
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.rpartition("data: ")[2]) for event in events]


def check_idle(engine: TorchEngine, steps: int) -> None:
    """Nothing is left, after the step that was running and one that may have begun at once."""
    wait_until(lambda: not engine.stats().running)
    stats = engine.stats()
    assert (stats.waiting, stats.kv_tokens_used) == (0, 0)
    assert stats.steps - steps <= 2


@pytest.mark.parametrize("path", BODIES)
def test_inside_a_stream_it_is_the_last_event(path: str, url: str, engine: TorchEngine) -> None:
    body = {**BODIES[path], "stream": True}
    with httpx.stream("POST", f"{url}{path}", json=body, headers=SOON, timeout=30) as response:
        text = "".join(response.iter_text())
        steps = engine.stats().steps
    assert response.status_code == 200
    *output, last = payloads(text)
    assert len(output) > 3
    error = last["response"]["error"] if path == "/v1/responses" else last["error"]
    assert error["message"] == "the request's time of 0.4 s ran out while it was answered"
    if path == "/v1/responses":
        assert (last["type"], error["code"]) == ("response.failed", "server_error")
    else:
        assert (error["type"], error["code"]) == ("server_error", "request_timeout")
    check_idle(engine, steps)


@pytest.mark.parametrize("path", BODIES)
def test_a_whole_answer_is_504_and_not_asked_for_again(
    path: str, url: str, engine: TorchEngine
) -> None:
    response = httpx.post(f"{url}{path}", json=BODIES[path], headers=SOON, timeout=30)
    check_idle(engine, engine.stats().steps)
    assert response.status_code == 504
    error = error_of(response)
    assert (error["type"], error["code"], error["param"]) == (
        "server_error",
        "request_timeout",
        None,
    )
    assert response.headers["x-should-retry"] == "false"


def count(url: str, line: str) -> float:
    return float(
        httpx.get(f"{url}/metrics").text.partition(f"\n{line} ")[2].partition("\n")[0] or 0
    )


TIMEOUTS = 'lorasb_requests_total{outcome="timeout",path="/v1/completions",status="504"}'
ENDED = 'lorasb_sequences_finished_total{finished_reason="timeout"}'


def test_openais_client_retries_what_had_not_begun(url: str, engine: TorchEngine) -> None:
    before, ended = count(url, TIMEOUTS), count(url, ENDED)
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1) as client:

        def ask(n: int) -> None:
            with pytest.raises(InternalServerError, match="ran out"):
                client.completions.create(
                    model="pico",
                    prompt="x",
                    max_tokens=16000,
                    n=n,
                    extra_body={"ignore_eos": True},
                    extra_headers=SOON,
                )

        def counted(requests: int, sequences: int) -> bool:
            found = (count(url, TIMEOUTS) - before, count(url, ENDED) - ended)
            return found == (requests, sequences)

        ask(2)  # begun: asked for once
        wait_until(lambda: counted(1, 2))
        body = {**PLAIN, "n": 2, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            ask(1)  # it waits all its time, twice
            wait_until(lambda: counted(3, 4))
            assert engine.stats().running == 2 and engine.stats().waiting == 0
            next(lines)  # those that ran go on
    check_idle(engine, engine.stats().steps)


def test_the_servers_limit_is_the_most(pico: Path) -> None:
    engine = FakeEngine.of(pico)
    engine.pace = 0.05
    body = {"model": "pico", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    with served(create_app(engine, None, ServerConfig("pico", request_timeout=0.3))) as url:
        for headers, seconds in (({}, "0.3"), ({"X-Request-Timeout": "9"}, "0.3"), (SOON, "0.3")):
            response = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
            assert response.status_code == 504
            assert f"time of {seconds} s" in error_of(response)["message"]
        shorter = {"X-Request-Timeout": "0.125"}
        response = httpx.post(f"{url}/v1/completions", json=body, headers=shorter)
        assert "time of 0.125 s" in error_of(response)["message"]
        answer = httpx.post(f"{url}/v1/completions", json={**body, "max_tokens": 2})
        assert answer.status_code == 200
    assert (engine.open, engine.finished, engine.aborted) == (0, 1, 4)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "1 s", ""])
def test_a_time_that_is_none_is_refused(value: str, url: str, engine: TorchEngine) -> None:
    headers = {"X-Request-Timeout": value}
    response = httpx.post(f"{url}/v1/completions", json=PLAIN, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["param"] == "X-Request-Timeout"
    assert "expected seconds above 0" in error_of(response)["message"]


class HangingStore(AdapterStore):
    """A store that answers once it may."""

    open = threading.Event()

    def current(self, name: AdapterName) -> str:
        assert self.open.wait(20)
        return super().current(name)


def test_the_time_runs_while_an_adapter_is_loaded(pico: Path, tmp_path: Path) -> None:
    basis, engine = tiny_basis(), FakeEngine.of(pico)
    store = HangingStore(str(tmp_path))
    store.publish(parse_name("a"), adapter_bytes(basis, 1.0))
    app = create_app(engine, AdapterLoader(store, basis), ServerConfig("pico"))
    body = {"model": "a", "prompt": "x"}
    with served(app) as url:
        response = httpx.post(f"{url}/v1/completions", json=body, headers=SOON)
        assert response.status_code == 504
        assert "before it was begun" in error_of(response)["message"]
        assert "x-should-retry" not in response.headers
        assert not engine.requests
        store.open.set()
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


def test_the_streams_end_although_nobody_reads() -> None:
    ended = []

    async def endless(name: str) -> AsyncIterator[str]:
        try:
            while True:
                yield name
                await asyncio.sleep(0)
        finally:
            ended.append(name)

    async def read_one() -> None:
        stop: asyncio.Future[LorasbError] = asyncio.get_running_loop().create_future()
        both = interleave([endless("a"), endless("b")], stop)
        assert await anext(both) == (0, "a")
        stop.set_result(DeadlineError(1.0, begun=True))
        for _ in range(3):
            await asyncio.sleep(0)
        assert sorted(ended) == ["a", "b"]
        with pytest.raises(DeadlineError):
            async for _ in both:
                pass

    asyncio.run(read_one())

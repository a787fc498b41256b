"""The bounded queue: who finds it full is refused before any work, and told when to come again."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, folder_loader, served, tiny_basis, wait_until
from openai import OpenAI
from sites import error_of

from lorasb_runtime.engines.base import EngineInfo
from lorasb_server.admission import Admission
from lorasb_server.app import create_app
from lorasb_server.errors import FieldError
from lorasb_server.refusals import QueueFullError
from lorasb_server.settings import ServerConfig

RUN, WAIT = 2, 3
MOST = RUN + WAIT
HELD = 0.3  # seconds between tokens, until a test lets them go
BODY: dict[str, Any] = {"model": "pico", "prompt": "x", "max_tokens": 100, "ignore_eos": True}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": BODY,
    "/v1/chat/completions": {"model": "pico", "messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"model": "pico", "input": "x"},
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def url(engine: FakeEngine, tmp_path: Path) -> Iterator[str]:
    engine.info = EngineInfo(256, 259, "float32", max_num_seqs=RUN)
    config = ServerConfig("pico", max_queue=WAIT)
    with served(create_app(engine, folder_loader(tmp_path, tiny_basis()), config)) as url:
        yield url


class Asker:
    """Requests that wait for their answers in threads of their own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[httpx.Response] = []
        self._threads: list[threading.Thread] = []

    def ask(self, count: int, **more: Any) -> None:
        new = [threading.Thread(target=self._ask, kwargs=more) for _ in range(count)]
        for thread in new:
            thread.start()
        self._threads += new

    def _ask(self, **more: Any) -> None:
        body = {**BODY, **more}
        self.answers.append(httpx.post(f"{self.url}/v1/completions", json=body, timeout=60))

    def statuses(self) -> list[int]:
        for thread in self._threads:
            thread.join()
        return sorted(answer.status_code for answer in self.answers)


def test_no_more_get_in_than_fit_however_they_come(url: str, engine: FakeEngine) -> None:
    engine.pace = HELD
    asker = Asker(url)
    asker.ask(30)
    wait_until(lambda: len(asker.answers) == 30 - MOST)
    engine.pace = 0.0
    assert asker.statuses() == [200] * MOST + [429] * (30 - MOST)
    assert len(engine.requests) == engine.finished == MOST
    asker.ask(MOST)
    assert asker.statuses().count(200) == 2 * MOST
    for answer in asker.answers:
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            error = error_of(answer)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert f"found {MOST} sequences running or waiting and 1 asked for" in error["message"]


def test_every_completion_counts_and_each_leaves_its_own_place(
    url: str, engine: FakeEngine
) -> None:
    engine.pace = HELD
    asker = Asker(url)
    asker.ask(1, n=2)
    wait_until(lambda: engine.open == 1)
    asker.ask(1, prompt=["a", "b"])
    wait_until(lambda: engine.open == 3)
    full = httpx.post(f"{url}/v1/completions", json={**BODY, "n": 2})
    assert full.status_code == 429 and "2 asked for" in error_of(full)["message"]
    asker.ask(1)
    wait_until(lambda: engine.open == 4)
    for count in ({"n": MOST + 1}, {"n": 2, "prompt": ["a", "b", "c"]}):
        never = httpx.post(f"{url}/v1/completions", json={**BODY, **count})
        assert never.status_code == 400
        assert error_of(never)["param"] == "n" and "at most 5" in error_of(never)["message"]
    engine.pace = 0.0
    assert asker.statuses() == [200, 200, 200]


def test_the_full_queue_is_told_before_anything_else_is_looked_at(
    url: str, engine: FakeEngine
) -> None:
    engine.pace = HELD
    asker = Asker(url)
    asker.ask(1, n=MOST)
    wait_until(lambda: engine.open == 1)
    for path, body in PATHS.items():
        for stream in (False, True):
            refused = httpx.post(f"{url}{path}", json={**body, "model": "gone", "stream": stream})
            assert refused.status_code == 429
    assert httpx.get(f"{url}/v1/models").status_code == 200
    assert httpx.post(f"{url}/tokenize", json={"prompt": "x"}).status_code == 200
    engine.pace = 0.0
    assert asker.statuses() == [200]
    for path, body in PATHS.items():
        assert httpx.post(f"{url}{path}", json=body).status_code == 200
    for body in ({"model": "gone"}, {"n": 500}, {"prompt": [9999]}):  # give their places back
        assert httpx.post(f"{url}/v1/completions", json={**BODY, **body}).status_code >= 400
    with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True, "n": MOST}):
        pass  # and so does a client that goes
    wait_until(lambda: engine.open == 0)
    asker.ask(1, n=MOST, max_tokens=1)
    assert asker.statuses() == [200, 200]


def test_openais_client_comes_again_when_it_is_told_to(url: str, engine: FakeEngine) -> None:
    engine.pace = HELD
    asker = Asker(url)
    asker.ask(1, n=MOST)
    wait_until(lambda: engine.open == 1)
    threading.Timer(0.3, lambda: setattr(engine, "pace", 0.0)).start()
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10) as client:
        answer = client.completions.with_raw_response.create(model="pico", prompt="x", max_tokens=3)
    assert answer.retries_taken >= 1
    assert answer.parse().choices[0].finish_reason == "length"
    assert asker.statuses() == [200]


def test_retry_after_is_how_long_places_have_taken_to_become_free() -> None:
    clock = Clock()
    admission = Admission(2, 2, clock)
    places = [admission.enter(1) for _ in range(4)]

    def retry_after(count: int = 1) -> int:
        with pytest.raises(QueueFullError) as refusal:
            admission.enter(count)
        return refusal.value.retry_after

    assert retry_after() == 1
    clock.now += 7  # nothing ends: as long again
    assert retry_after() == 7
    clock.now += 3
    for ended in places[:2]:  # two in 10 s: one in 5
        ended.leave()
    admission.enter(2)
    assert retry_after() == 5
    assert retry_after(3) == 15
    clock.now += 59  # no longer than a minute is looked back on
    assert retry_after(4) == 60
    clock.now += 100
    assert retry_after() == 60
    for ended in places:
        ended.close()
    assert admission.inside == 2
    with pytest.raises(FieldError, match="at most 4 fit"):
        admission.enter(5)


def test_an_idle_time_is_no_time_of_waiting() -> None:
    clock = Clock()
    admission = Admission(1, 0, clock)
    admission.enter(1).close()
    clock.now += 40
    places = admission.enter(1)
    with pytest.raises(QueueFullError) as refusal:
        admission.enter(1)
    assert refusal.value.retry_after == 1
    places.leave()
    places.close()
    assert admission.inside == 0

"""Two server processes on one bucket, and what each fault of the bucket does to whom."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from bases import random_adapter, random_basis
from buckets import BUCKET, KEYS, drop_bucket, make_bucket, plain_http, s3_service
from fake_engine import wait_until
from faulty_proxy import FAULTS, FaultyProxy, faulty_proxy
from serving import serving

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.storage.adapter_file import serialize_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis

TIMEOUT = 3.0  # --store-timeout
REFRESH = 1.0  # --refresh


@dataclass(frozen=True)
class Replicas:
    """Two servers on one bucket, which they reach through a proxy each test may break."""

    urls: tuple[str, str]
    proxy: FaultyProxy
    service: str
    basis: Basis

    def adapter(self, seed: int) -> bytes:
        return serialize_adapter(random_adapter(self.basis, seed, 3.0))

    def put(self, replica: int, name: str, seed: int) -> str:
        url = f"{self.urls[replica]}/v1/adapters/{name}"
        answer = httpx.put(url, content=self.adapter(seed), timeout=30).raise_for_status()
        return str(answer.json()["version"])

    def ask(self, replica: int, model: str) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}
        return httpx.post(f"{self.urls[replica]}/v1/completions", json=body, timeout=30)

    def say(self, replica: int, model: str) -> str:
        text: str = self.ask(replica, model).raise_for_status().json()["choices"][0]["text"]
        return text


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico)


@pytest.fixture(scope="module")
def basis_file(basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    save_basis(basis, path)
    return path


@pytest.fixture(scope="module")
def pair(
    pico: Path, basis: Basis, basis_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("replicas")
    flags = ("--basis", basis_file, "--adapters", f"s3://{BUCKET}/store")
    flags += ("--store-timeout", TIMEOUT, "--refresh", REFRESH, "--kv-cache-gib", 0.01)
    with (
        pytest.MonkeyPatch.context() as patch,
        s3_service() as service,
        faulty_proxy(service) as proxy,
    ):
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.url}.items():
            patch.setenv(key, value)
        with (
            serving(folder / "a.log", pico, *flags) as a,
            serving(folder / "b.log", pico, *flags) as b,
        ):
            yield Replicas((a, b), proxy, service, basis)


@pytest.fixture
def replicas(pair: Replicas) -> Iterator[Replicas]:
    yield pair
    pair.proxy.heal()


def test_what_one_replica_publishes_the_other_serves(replicas: Replicas) -> None:
    replicas.put(0, "alice", 1)
    first = replicas.say(0, "alice")
    assert replicas.say(1, "alice") == first != replicas.say(1, "pico")
    replicas.put(1, "alice", 2)
    published = time.monotonic()
    second = replicas.say(1, "alice")
    assert second != first
    while replicas.say(0, "alice") != second:
        assert time.monotonic() - published < REFRESH + 1
        time.sleep(0.05)
    httpx.post(f"{replicas.urls[0]}/v1/adapters/alice/rollback").raise_for_status()
    wait_until(lambda: replicas.say(1, "alice") == first, REFRESH + 1)
    assert replicas.ask(1, "unknown").status_code == 404
    replicas.put(0, "unknown", 3)
    wait_until(lambda: replicas.ask(1, "unknown").status_code == 200, REFRESH + 1)
    names = [m["id"] for m in httpx.get(f"{replicas.urls[1]}/v1/models").json()["data"]]
    assert names == ["pico", "alice", "unknown"]


def _timed(ask: Callable[[], httpx.Response]) -> tuple[httpx.Response, float]:
    start = time.monotonic()
    return ask(), time.monotonic() - start


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_bucket_fails_only_what_needs_it(replicas: Replicas, fault: str) -> None:
    replicas.put(0, "cached", 4)
    replicas.put(0, f"new-{fault}", 5)
    time.sleep(REFRESH)
    said, base = replicas.say(1, "cached"), replicas.say(1, "pico")
    time.sleep(REFRESH)
    replicas.proxy.fault = fault
    with ThreadPoolExecutor(40) as pool:
        # More than the loader has threads, and than asyncio's pool has.
        failing = [
            pool.submit(_timed, lambda: replicas.ask(1, f"new-{fault}")),
            *[pool.submit(_timed, lambda i=i: replicas.ask(1, f"no-{i}")) for i in range(39)],
        ]
        time.sleep(0.3)
        for _ in range(3):
            good, took = _timed(lambda: replicas.ask(1, "cached"))
            assert good.status_code == 200 and took < TIMEOUT
            assert good.json()["choices"][0]["text"] == said
            good, took = _timed(lambda: replicas.ask(1, "pico"))
            assert good.json()["choices"][0]["text"] == base and took < 2
        for response, took in (f.result() for f in failing):
            if fault in ("truncated", "damaged") and response.status_code == 404:
                continue  # S3 says by its status alone that a name is unknown
            assert response.status_code == 503, response.text
            assert "store" in response.json()["error"]["message"]
            assert took < TIMEOUT + 3
    replicas.proxy.heal()
    wait_until(lambda: replicas.ask(1, f"new-{fault}").status_code == 200, TIMEOUT + 3)
    replicas.put(0, "cached", 6)
    wait_until(lambda: replicas.say(1, "cached") != said, TIMEOUT + 3)


def test_a_bucket_that_is_gone(replicas: Replicas) -> None:
    replicas.put(1, "cached", 4)
    said = replicas.say(1, "cached")
    drop_bucket(replicas.service)
    try:
        time.sleep(REFRESH)
        assert replicas.say(1, "cached") == said
        for response in (
            replicas.ask(1, "nobody"),
            httpx.get(f"{replicas.urls[0]}/v1/adapters", timeout=30),
            httpx.put(f"{replicas.urls[0]}/v1/adapters/x", content=replicas.adapter(1), timeout=30),
        ):
            assert response.status_code == 503, response.text
            assert "bucket does not exist" in response.json()["error"]["message"]
        assert replicas.ask(1, "pico").status_code == 200
    finally:
        make_bucket(replicas.service)
    replicas.put(0, "fresh", 5)
    assert replicas.say(1, "fresh")


def test_a_plain_http_server_as_the_store(
    pico: Path, basis: Basis, basis_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    store = AdapterStore(str(folder))
    for seed, name in enumerate(("alice", "bob", "team/carol")):
        store.publish(parse_name(name), serialize_adapter(random_adapter(basis, seed, 3.0)))
    with plain_http(folder) as address, faulty_proxy(address) as proxy:
        flags: list[Any] = ["--basis", basis_file, "--adapters", proxy.url, "--stale", 0]
        flags += ["--store-timeout", TIMEOUT, "--refresh", 0.2, "--kv-cache-gib", 0.01]
        with serving(tmp_path / "log", pico, *flags) as url:
            replicas = Replicas((url, url), proxy, address, basis)
            said = {replicas.say(0, name) for name in ("alice", "bob", "team/carol", "pico")}
            assert len(said) == 4
            assert replicas.ask(0, "nobody").status_code == 404
            card = httpx.get(f"{url}/v1/adapters/alice").json()
            assert card["version"] == store.current(parse_name("alice"))
            assert card["basis"] == basis.digest
            for refused in (
                httpx.get(f"{url}/v1/adapters"),
                httpx.put(f"{url}/v1/adapters/x", content=replicas.adapter(1)),
                httpx.delete(f"{url}/v1/adapters/alice"),
            ):
                assert refused.status_code == 409, refused.text
            assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["pico"]
            for fault in FAULTS:
                proxy.fault = fault
                time.sleep(0.2)
                response, took = _timed(lambda: replicas.ask(0, "alice"))
                assert response.status_code == 503 and took < TIMEOUT + 2, response.text
                assert replicas.ask(0, "pico").status_code == 200
                proxy.heal()
                assert replicas.say(0, "alice")

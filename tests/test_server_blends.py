"""Blends and inline adapters over HTTP, against adapters published with the same content."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bases import random_adapter, random_basis
from serving import serving

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.merging.combine import combine_adapters
from lorasb_runtime.merging.linear import combine
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.storage.adapter_file import Adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis

WEIGHTS = (0.7, -0.4)


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico)


@pytest.fixture(scope="module")
def url(pico: Path, basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    work = tmp_path_factory.mktemp("blends")
    save_basis(basis, work / "basis.safetensors")
    store = AdapterStore(str(work / "store"))
    parts = [random_adapter(basis, seed, 3.0) for seed in range(2)]
    cores = combine_adapters(
        [WeightedAdapter(a, w) for a, w in zip(parts, WEIGHTS, strict=True)], basis, combine
    )
    for name, adapter in (
        ("a", parts[0]),
        ("b", parts[1]),
        ("mixed", Adapter(cores, basis.digest)),
    ):
        store.publish(parse_name(name), serialize_adapter(adapter))
    flags = ("--basis", work / "basis.safetensors", "--adapters", store.url)
    with serving(work / "log", pico, *flags) as found:
        yield found


def ask(url: str, adapter: Any) -> httpx.Response:
    body = {"model": "pico", "prompt": "hello", "max_tokens": 16, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json={**body, "adapter": adapter}, timeout=30)


def text(url: str, adapter: Any) -> str:
    return str(ask(url, adapter).raise_for_status().json()["choices"][0]["text"])


def blend(*weights: float) -> list[dict[str, Any]]:
    return [{"name": n, "weight": w} for n, w in zip(("a", "b"), weights, strict=True)]


def test_a_blend_says_what_the_same_adapter_says_when_published(url: str) -> None:
    expected = text(url, "mixed")
    assert len({expected, text(url, "a"), text(url, "b"), text(url, None)}) == 4
    assert text(url, blend(*WEIGHTS)) == text(url, blend(*WEIGHTS)[::-1]) == expected
    assert text(url, blend(1, 0)) == text(url, blend(1, 0)[:1]) == text(url, "a")
    assert text(url, blend(0, 0)) == text(url, None)


def test_an_inline_adapter_says_what_it_says_when_published(url: str, basis: Basis) -> None:
    data = serialize_adapter(random_adapter(basis, 1, 3.0))
    assert text(url, {"inline": base64.b64encode(data).decode()}) == text(url, "b")


def test_what_cannot_be_made_is_refused(url: str, pico: Path, basis: Basis) -> None:
    missing = ask(url, [*blend(1, 1), {"name": "gone", "weight": 0}])
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "adapter.2.name"
    foreign = serialize_adapter(random_adapter(random_basis(pico, seed=9), 1))
    refused = ask(url, {"inline": base64.b64encode(foreign).decode()})
    assert refused.status_code == 422
    assert basis.digest in refused.json()["error"]["message"]
    assert ask(url, {"inline": "A" * (8 << 20)}).status_code == 413
    assert ask(url, [{"name": "a", "weight": 1}] * 17).status_code == 400


def test_metrics_of_adapters(url: str) -> None:
    text(url, "a")
    metrics = httpx.get(f"{url}/metrics").text
    for line in (
        'lorasb_adapter_requests_total{adapter="a"}',
        "lorasb_slot_fills_total",
        "lorasb_loader_hits_total",
        'lorasb_loader_fetch_seconds_bucket{le="+Inf"}',
    ):
        assert float(metrics.partition(f"\n{line} ")[2].partition("\n")[0]) >= 1, line

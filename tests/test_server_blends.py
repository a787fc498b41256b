"""Blends and inline adapters at the door: which version runs, what is refused, and how often.

The engine is a fake; what a blend makes the model say is tests/test_blend_serving.py's.
"""

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fake_engine import FakeEngine, adapter_bytes, folder_loader, served, tiny_basis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.engines.base import EngineInfo
from lorasb_runtime.merging import blend as blending
from lorasb_runtime.ops.core_matmul import resident_cores
from lorasb_runtime.storage.adapter_file import (
    HEADER_ALLOWANCE,
    Adapter,
    serialize_adapter,
    version_of,
)
from lorasb_runtime.storage.basis_file import Basis
from lorasb_server import blender as blender_file
from lorasb_server.app import create_app
from lorasb_server.blender import Blender, encoded_length
from lorasb_server.settings import ServerConfig

BASIS = tiny_basis()
VALUES = {"alice": 1.0, "team/bob": 2.0, "carol": -3.0}
PATHS = ("chat/completions", "completions")
CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def engine(pico: Path) -> FakeEngine:
    engine = FakeEngine.of(pico)
    engine.info = EngineInfo(256, 259, "float32", core_dtype="float16")
    return engine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def loader(store: Path) -> AdapterLoader:
    loader = folder_loader(store, BASIS)
    for name, value in VALUES.items():
        loader.publish(parse_name(name), adapter_bytes(BASIS, value))
    return loader


@pytest.fixture(scope="module")
def api(engine: FakeEngine, loader: AdapterLoader) -> Iterator[httpx.Client]:
    app = create_app(engine, loader, ServerConfig("pico"))
    with served(app) as url, httpx.Client(base_url=url, timeout=30) as api:
        yield api


def ask(api: httpx.Client, adapter: Any, path: str = "completions") -> httpx.Response:
    body: dict[str, Any] = CHAT if path.startswith("chat") else {"prompt": "x"}
    body = {"model": "pico", "max_tokens": 1, **body, "adapter": adapter}
    header = {"Content-Type": "application/json"}
    return api.post(f"/v1/{path}", content=json.dumps(body), headers=header)  # NaN and all


def ran(api: httpx.Client, engine: FakeEngine, adapter: Any, path: str = PATHS[1]) -> Any:
    """The loaded adapter that a request with this field ran on."""
    response = ask(api, adapter, path)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == "pico"
    return engine.requests[-1].adapter


def parts(**weights: float) -> list[dict[str, Any]]:
    return [{"name": name.replace("_", "/"), "weight": w} for name, w in weights.items()]


def inline(data: bytes) -> dict[str, str]:
    return {"inline": base64.b64encode(data).decode()}


@pytest.mark.parametrize("path", PATHS)
def test_a_blend_is_the_weighted_sum_whatever_its_order(
    path: str, api: httpx.Client, engine: FakeEngine
) -> None:
    blend = parts(alice=0.5, team_bob=-1.25, carol=2)
    found = ran(api, engine, blend, path)
    assert found.cores.dtype == torch.float64  # the slot rounds it, once
    assert found.cores.tolist() == [0.5 - 2.5 - 6.0] * BASIS.size
    again = ran(api, engine, blend[::-1], path)
    assert again.version == found.version
    assert again.cores is found.cores  # computed once


def test_what_is_one_adapter_is_that_adapter(api: httpx.Client, engine: FakeEngine) -> None:
    alice = ran(api, engine, "alice")
    for blend in (
        [{"name": "alice"}],
        parts(alice=1),
        parts(alice=1, carol=0),
        [*parts(alice=0.5), *parts(carol=0.1), *parts(alice=0.5, carol=-0.1)],
    ):
        found = ran(api, engine, blend)
        assert (found.version, found.name) == (alice.version, alice.name)
        assert found.cores is alice.cores
    assert ran(api, engine, parts(alice=0)) is None
    assert ran(api, engine, [*parts(alice=2), *parts(alice=-2)]) is None
    twice = ran(api, engine, [*parts(alice=0.25), *parts(alice=0.25)])
    assert twice.version == ran(api, engine, parts(alice=0.5)).version != alice.version


def test_a_blend_follows_what_is_published(
    api: httpx.Client, engine: FakeEngine, loader: AdapterLoader
) -> None:
    loader.publish(parse_name("dave"), adapter_bytes(BASIS, 1.0))
    first = ran(api, engine, parts(dave=2))
    assert first.version == ran(api, engine, parts(alice=2)).version  # by content, not by name
    loader.publish(parse_name("dave"), adapter_bytes(BASIS, 5.0))
    second = ran(api, engine, parts(dave=2))
    assert second.version != first.version and second.cores.tolist() == [10.0] * BASIS.size


@pytest.mark.parametrize("path", PATHS)
def test_an_inline_adapter_is_as_if_published(
    path: str, api: httpx.Client, engine: FakeEngine
) -> None:
    alice = ran(api, engine, "alice", path)
    found = ran(api, engine, inline(adapter_bytes(BASIS, VALUES["alice"])), path)
    assert found.version == alice.version
    assert found.cores.tolist() == alice.cores.half().tolist()
    fresh = adapter_bytes(BASIS, 7.0)
    found = ran(api, engine, inline(fresh), path)
    assert found.version == version_of(fresh) and found.cores.tolist() == [7.0] * BASIS.size


def test_the_largest_inline_adapter_passes_and_a_larger_one_is_too_large(
    api: httpx.Client, engine: FakeEngine
) -> None:
    room = 4 * BASIS.size + HEADER_ALLOWANCE
    plain = len(serialize_adapter(Adapter(torch.ones(BASIS.size), BASIS.digest, "")))
    name = "n" * ((room - plain) // 8 * 8)
    full = serialize_adapter(Adapter(torch.ones(BASIS.size), BASIS.digest, name))
    assert room - 8 < len(full) <= room
    assert ran(api, engine, inline(full)).version == version_of(full)
    refused = ask(api, inline(full + b" " * 8))
    assert refused.status_code == 413
    assert refused.json()["error"]["param"] == "adapter.inline"
    assert f"at most {encoded_length(room)} fit" in refused.text


def test_a_body_has_room_for_an_inline_adapter(pico: Path, store: Path) -> None:
    config = ServerConfig("pico", max_request_bytes=1000)
    with served(create_app(FakeEngine.of(pico), folder_loader(store, BASIS), config)) as url:
        name = "n" * (HEADER_ALLOWANCE - 1000)
        data = serialize_adapter(Adapter(torch.ones(BASIS.size), BASIS.digest, name))
        body = {"model": "pico", "prompt": "x", "max_tokens": 1, "adapter": inline(data)}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        body["prompt"] = "x" * (3 << 20)
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 413


GOOD = adapter_bytes(BASIS, 1.0)
HUGE = serialize_adapter(Adapter(torch.full((BASIS.size,), 1e6), BASIS.digest))
SHORT = serialize_adapter(Adapter(torch.ones(BASIS.size - 1), BASIS.digest))
REFUSALS: list[tuple[Any, int, str, str]] = [
    ([], 400, "adapter", "at least 1"),
    (parts(alice=1) * 17, 400, "adapter", "at most 16"),
    (5, 400, "adapter", "a name, a list of"),
    (["alice"], 400, "adapter.0", "valid dictionary"),
    ([{"weight": 1}], 400, "adapter.0.name", "required"),
    ([{"name": "alice", "scale": 1}], 400, "adapter.0.scale", "not supported"),
    ([{"name": "alice", "weight": "1"}], 400, "adapter.0.weight", "valid number"),
    ([{"name": "alice", "weight": True}], 400, "adapter.0.weight", "valid number"),
    ([{"name": "alice", "weight": None}], 400, "adapter.0.weight", "valid number"),
    (parts(alice=float("nan")), 400, "adapter.0.weight", "finite"),
    (parts(alice=float("inf")), 400, "adapter.0.weight", "finite"),
    (parts(alice=101), 400, "adapter.0.weight", "less than or equal"),
    (parts(alice=-101), 400, "adapter.0.weight", "greater than or equal"),
    (parts(alice=1, nobody=0), 404, "adapter.1.name", "'nobody' does not exist"),
    ([{"name": "../x"}, {"name": "nobody"}], 404, "adapter.0.name", "'../x' does not exist"),
    (parts(pico=1), 404, "adapter.0.name", "'pico' does not exist"),
    ({}, 400, "adapter.inline", "required"),
    ({"inline": "", "name": "x"}, 400, "adapter.name", "not supported"),
    ({"inline": 5}, 400, "adapter.inline", "valid string"),
    ({"inline": "?"}, 400, "adapter.inline", "no base64"),
    ({"inline": "é"}, 400, "adapter.inline", "no base64"),
    ({"inline": inline(GOOD)["inline"] + "\n"}, 400, "adapter.inline", "no base64"),
    ({"inline": ""}, 400, "adapter.inline", "found 0 bytes"),
    (inline(GOOD[:-1]), 400, "adapter.inline", "do not parse"),
    (inline(SHORT), 400, "adapter.inline", "found 3 core numbers, expected 4"),
    (inline(adapter_bytes(tiny_basis(1), 1.0)), 422, "adapter.inline", "found an adapter for"),
    (inline(HUGE), 400, "adapter.inline", "do not fit float16"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("adapter", "status", "param", "text"), REFUSALS)
def test_a_refusal_names_the_field(
    adapter: Any, status: int, param: str, text: str, path: str, api: httpx.Client
) -> None:
    refused = ask(api, adapter, path)
    assert refused.status_code == status, refused.text
    error = refused.json()["error"]
    assert error["param"] == param and text in error["message"]


def test_a_blend_that_leaves_the_slots_range_is_refused(
    api: httpx.Client, loader: AdapterLoader, engine: FakeEngine
) -> None:
    loader.publish(parse_name("big"), adapter_bytes(BASIS, 60000.0))
    refused = ask(api, parts(big=2))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "adapter" and "do not fit float16" in error["message"]
    assert ran(api, engine, [*parts(big=2), *parts(big=-1.5)]).cores.tolist() == [30000.0] * 4


def test_an_adapter_of_another_basis_or_a_damaged_one_spoils_its_blend_alone(
    api: httpx.Client, engine: FakeEngine, store: Path
) -> None:
    other = tiny_basis(1)
    folder_loader(store, other).publish(parse_name("other"), adapter_bytes(other, 1.0))
    refused = ask(api, parts(alice=1, other=1))
    assert refused.status_code == 422 and other.digest in refused.text
    (store / "default" / "broken").mkdir()
    (store / "default" / "broken" / "current").write_text("junk")
    assert ask(api, parts(alice=1, broken=1)).status_code == 503
    assert ran(api, engine, parts(alice=3)).cores.tolist() == [3.0] * BASIS.size


def test_an_adapter_in_both_fields_and_a_server_without_a_basis(
    api: httpx.Client, pico: Path
) -> None:
    for adapter in (parts(alice=1), inline(GOOD)):
        body = {"model": "alice", "prompt": "x", "adapter": adapter}
        refused = api.post("/v1/completions", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "adapter"
        with served(create_app(FakeEngine.of(pico), None, ServerConfig("pico"))) as url:
            body["model"] = "pico"
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 404


def test_requests_for_one_blend_at_the_same_time_compute_it_once(
    api: httpx.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, made = threading.Event(), threading.Event(), []

    def slowly(*args: Any) -> torch.Tensor:
        made.append(1)
        begun.set()
        assert go.wait(10)
        return blending.exact_blend(*args)

    monkeypatch.setattr(blender_file, "exact_blend", slowly)
    before = len(engine.requests)
    answers: list[httpx.Response] = []
    blend = parts(alice=0.125, carol=0.5)
    threads = [threading.Thread(target=lambda: answers.append(ask(api, blend))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert api.get("/health").status_code == 200  # the event loop is not held up
    go.set()
    for thread in threads:
        thread.join(20)
    assert [a.status_code for a in answers] == [200] * 4
    assert len(made) == 1
    used = [r.adapter for r in engine.requests[before:]]
    assert all(a and a.cores is used[0].cores for a in used)


SCALED = Basis(BASIS.targets, BASIS.tensors, "lora-sb", scaling=1.1)
WEIGHTS = st.floats(-100, 100)
ENTRIES = st.lists(st.tuples(st.sampled_from("abc"), WEIGHTS), min_size=1, max_size=16)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(entries=ENTRIES, data=st.data())
def test_any_blend_is_the_exact_sum_rounded_once(
    entries: list[tuple[str, float]], data: st.DataObject, tmp_path: Path
) -> None:
    """Of the files' own cores: scaled ones have been rounded before, at this scaling."""
    loader = folder_loader(tmp_path, SCALED)
    loaded: dict[str, LoadedAdapter] = {}
    for seed, name in enumerate("abc"):
        cores = torch.randn(SCALED.size, generator=torch.Generator().manual_seed(seed))
        loaded[name] = loader.publish(
            parse_name(name), serialize_adapter(Adapter(cores, SCALED.digest))
        )
    blender = Blender(loader.basis, torch.float32, MemoryCache(1 << 20, 8))
    found = blender.blend([(loaded[name], weight) for name, weight in entries])
    shuffled = data.draw(st.permutations(entries))
    again = blender.blend([(loaded[name], weight) for name, weight in shuffled])
    assert (again and again.version) == (found and found.version)
    file = {name: item.cores.double() for name, item in loaded.items()}
    exact = 1.1 * sum(weight * file[name] for name, weight in entries)
    cores = torch.zeros(SCALED.size)
    if found:
        cores = resident_cores(found.cores, SCALED.scaling, torch.float32).double()
    size = 1.1 * sum(abs(weight) * file[name].abs() for name, weight in entries)
    assert bool(((cores - exact).abs() <= 2.0**-24 * exact.abs() + 1e-14 * size + 1e-40).all())

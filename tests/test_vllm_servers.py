"""Both HTTP servers on the one engine: ours, and vLLM's own with the plugin's store."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm")
from bases import random_adapter
from fastapi import FastAPI
from vllm_asking import GREEDY, alone, text_of
from vllm_native import Native

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_config import LoaderConfig
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.engines.vllm.plugin import register
from lorasb_runtime.storage.adapter_file import Adapter, parse_adapter, serialize_adapter
from lorasb_server.app import create_app
from lorasb_server.settings import ServerConfig

PROMPT = list(range(40, 60))
Ask = Callable[..., httpx.Response]


def asking(native: Native, app: FastAPI) -> Ask:
    """Sends one HTTP request to the application, in the engine's loop."""

    async def send(method: str, path: str, **more: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **more)

    return lambda *words, **more: native.run(send(*words, **more))


def completion(ask: Ask, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}
    return ask("POST", "/v1/completions", json={"ignore_eos": True, **body})


def says(ask: Ask, model: str, **more: Any) -> str:
    response = completion(ask, model, **more)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    text: str = response.json()["choices"][0]["text"]
    return text


def expected(native: Native, adapter: Adapter | None) -> str:
    return text_of(alone(native, PROMPT, adapter, GREEDY))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    return AdapterStore(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def ours(native: Native, store: AdapterStore) -> Ask:
    loader = AdapterLoader(store, native.basis, LoaderConfig(refresh=0.0))
    return asking(native, create_app(native.engine, loader, ServerConfig("pico")))


@pytest.fixture(scope="module")
def theirs(native: Native, store: AdapterStore) -> Iterator[Ask]:
    """vLLM's own application, made as its `run_server` makes it, on the engine that runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASB_BASIS", str(native.basis_file))
        patch.setenv("LORASB_ADAPTERS", store.url)
        patch.setenv("LORASB_REFRESH", "0")
        register()
        register()
        yield asking(native, native.run(vllm_application(native)))


async def vllm_application(native: Native) -> FastAPI:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", str(native.model), "--served-model-name", "pico", "--enable-lora"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    client = native.engine._client
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    return app


def publish(store: AdapterStore, name: str, adapter: Adapter) -> None:
    store.publish(parse_name(name), serialize_adapter(adapter))


@pytest.mark.parametrize("server", ["ours", "theirs"])
def test_names_of_the_store_are_served_and_swapped(
    native: Native, store: AdapterStore, server: str, request: pytest.FixtureRequest
) -> None:
    ask: Ask = request.getfixturevalue(server)
    old, new = (random_adapter(native.basis, seed) for seed in (201, 202))
    base = says(ask, "pico")
    assert base == expected(native, None)
    publish(store, "team/alice", old)
    first = says(ask, "team/alice")
    publish(store, "team/alice", new)
    second = says(ask, "team/alice")
    assert [first, second] == [expected(native, old), expected(native, new)]
    assert len({base, first, second}) == 3
    listed = [card["id"] for card in ask("GET", "/v1/models").json()["data"]]
    assert listed[0] == "pico" and "team/alice" in listed
    for unknown in ("nobody", "../alice", "team/nobody"):
        response = completion(ask, unknown)
        assert response.status_code == 404
        assert unknown in response.json()["error"]["message"]


def test_chat_and_streams_take_an_adapter_of_the_store(
    native: Native, store: AdapterStore, ours: Ask, theirs: Ask
) -> None:
    publish(store, "carol", random_adapter(native.basis, 203))
    body = {
        "model": "carol",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answers = [
        ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        for ask in (ours, theirs)
    ]
    assert answers[0] == answers[1] != ""
    for ask in (ours, theirs):
        lines = ask("POST", "/v1/chat/completions", json={**body, "stream": True}).text
        assert lines.rstrip().endswith("data: [DONE]") and '"carol"' in lines


def test_a_blend_and_an_inline_adapter_need_no_file_for_vllm(native: Native, ours: Ask) -> None:
    parts = [random_adapter(native.basis, seed) for seed in (204, 205)]
    for name, adapter in zip(("x", "y"), parts, strict=True):
        put = ours("PUT", f"/v1/adapters/{name}", content=serialize_adapter(adapter))
        assert put.status_code in (200, 201), put.text
    weights = [{"name": "x", "weight": 0.7}, {"name": "y", "weight": 0.3}]
    exact = 0.7 * parts[0].cores.double() + 0.3 * parts[1].cores.double()
    sum_ = Adapter(exact.float(), native.basis.digest, "sum")
    blended = parse_adapter(serialize_adapter(sum_), "sum")
    assert says(ours, "pico", adapter=weights) == expected(native, blended)
    inline = {"inline": base64.b64encode(serialize_adapter(parts[1])).decode()}
    assert says(ours, "pico", adapter=inline) == expected(native, parts[1])


def test_metrics_show_the_engine(ours: Ask) -> None:
    text = ours("GET", "/metrics").text
    assert "lorasb_slots 32.0" in text and "lorasb_sequences_running 0.0" in text


def test_vllms_routes_that_load_a_path_are_closed(theirs: Ask, tmp_path: Path) -> None:
    body = {"lora_name": "evil", "lora_path": str(tmp_path)}
    for route in ("load", "unload"):
        response = theirs("POST", f"/v1/{route}_lora_adapter", json=body)
        assert response.status_code == 403
        assert "nothing is loaded from a path" in response.json()["error"]["message"]
    assert completion(theirs, "evil").status_code == 404


def test_vllms_server_says_what_is_wrong_with_an_adapter(
    native: Native, store: AdapterStore, theirs: Ask
) -> None:
    foreign = Adapter(random_adapter(native.basis, 1).cores, "sha256:other", "f")
    publish(store, "foreign", foreign)
    response = completion(theirs, "foreign")
    assert response.status_code == 422
    assert "sha256:other" in response.json()["error"]["message"]
    assert says(theirs, "pico") == expected(native, None)

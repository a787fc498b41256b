"""Refusals and failures: the right status, OpenAI's error object, and the field by its name."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, folder_loader, served, tiny_basis
from fastapi import FastAPI

from lorasb_runtime.errors import InputError
from lorasb_server import run
from lorasb_server.app import create_app
from lorasb_server.lifecycle import Lifecycle
from lorasb_server.settings import ListenConfig, ServerConfig

USER = {"role": "user", "content": "x"}
CHAT: dict[str, Any] = {"model": "pico", "messages": [USER]}
PLAIN: dict[str, Any] = {"model": "pico", "prompt": "x"}


@pytest.fixture(scope="module")
def engine(pico: Path) -> FakeEngine:
    return FakeEngine.of(pico)


@pytest.fixture(scope="module")
def url(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    loader = folder_loader(tmp_path_factory.mktemp("store"), tiny_basis())
    config = ServerConfig("pico", max_request_bytes=8 << 20, max_n=4)
    with served(create_app(engine, loader, config)) as url:
        yield url


BOTH: list[tuple[dict[str, Any], str, str]] = [
    *[({name: 1}, name, "not supported") for name in ("functions", "audio", "path", "body", "<x>")],
    *[({name: "5"}, name, "valid") for name in ("temperature", "n", "seed", "max_tokens", "min_p")],
    *[({name: True}, name, "valid") for name in ("temperature", "n", "top_k", "min_tokens")],
    ({"temperature": 2.1}, "temperature", "less than or equal"),
    ({"temperature": -0.1}, "temperature", "greater than or equal"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.1}, "top_p", "less than or equal"),
    ({"top_k": -2}, "top_k", "greater than or equal"),
    ({"min_p": 1.5}, "min_p", "less than or equal"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal"),
    ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal"),
    ({"n": 5}, "n", "at most 4"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "over max_tokens"),
    ({"stop": 5}, "stop", "a string or a list"),
    ({"stop": ["a", 1]}, "stop.1", "valid string"),
    ({"stop": [""]}, "stop.0", "at least 1"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "below 259"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal"),
    ({"stop_token_ids": [9999]}, "stop_token_ids", "below 259"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids.0", "valid integer"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
    ({"model": None}, "model", "valid string"),
]


def chat_of(**message: Any) -> dict[str, Any]:
    return {"messages": [USER, message]}


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
TOOL = {"type": "function", "function": {"name": "add"}}
NAMED = {"type": "function", "function": {"name": "sub"}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
BAD_CALL = {**CALL, "function": {"name": "add", "arguments": "[1]"}}
CALL_TYPE = "messages.1.tool_calls.0.type"
CHAT_ONLY: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "x"}, "messages", "valid list"),
    (chat_of(role="function", content="x"), "messages.1", "'assistant', 'tool'"),
    (chat_of(role="tool", content="x"), "messages.1.tool_call_id", "required"),
    (chat_of(role="user", content="x", tool_calls=[]), "messages.1.tool_calls", "not supported"),
    (chat_of(role="assistant", tool_calls=[{**CALL, "type": "x"}]), CALL_TYPE, "function"),
    (chat_of(role="assistant", tool_calls=[BAD_CALL]), "messages", "a JSON object"),
    (chat_of(role="assistant"), "messages.1", "content: missing"),
    (chat_of(role="user", content=None), "messages.1.content", "a string or a list"),
    (chat_of(role="user", content=3), "messages.1.content", "a string or a list"),
    (chat_of(role="user", content=IMAGE), "messages.1.content.0.type", "image_url"),
    (chat_of(role="assistant", content=IMAGE), "messages.1.content.0", "image_url"),
    (chat_of(role="user"), "messages.1.content", "required"),
    ({"tools": 1}, "tools", "valid list"),
    ({"tools": [TOOL, TOOL]}, "tools", "two functions named 'add'"),
    ({"tools": [{"type": "custom"}]}, "tools.0.type", "function"),
    ({"tool_choice": "auto"}, "tool_choice", "only allowed with tools"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "only allowed with tools"),
    ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice", "found 'sub'"),
    (
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        "tool_choice",
        "only go with none",
    ),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal"),
    ({"metadata": 1}, "metadata", "valid dictionary"),
    ({"store": True}, "store", "False"),
    ({"continue_final_message": True}, "continue_final_message", "the assistant's"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "a field of its own"),
    ({"top_logprobs": 1}, "top_logprobs", "only allowed with logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal"),
    ({"logprobs": 1}, "logprobs", "valid boolean"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "differs"),
    ({"max_completion_tokens": 999}, "max_completion_tokens", "context length"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "context length"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
]
PLAIN_ONLY: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "non-empty list"),
    ({"prompt": None}, "prompt", "text, token ids"),
    ({"prompt": [[]]}, "prompt.0", "at least 1"),
    ({"prompt": [1, "a"]}, "prompt.1", "valid integer"),
    ({"prompt": ["a", 1]}, "prompt.1", "valid string"),
    ({"prompt": [True]}, "prompt.0", "valid integer"),
    ({"prompt": [-1]}, "prompt.0", "greater than or equal"),
    ({"prompt": [[1], [259]]}, "prompt", "below 259"),
    ({"prompt": ["a", ""]}, "prompt", "no tokens"),
    ({"prompt": ["a"] * 257}, "prompt", "at most 256"),
    ({"prompt": "x" * 250, "max_tokens": 7}, "max_tokens", "context length"),
    ({"logprobs": 6}, "logprobs", "less than or equal"),
    ({"max_tokens": 0}, "max_tokens", "only goes with echo"),
    ({"echo": True, "logprobs": 1, "prompt_logprobs": 1}, "prompt_logprobs", "not allowed with"),
    ({"suffix": ""}, "suffix", "not supported"),
    ({"best_of": 3}, "best_of", "only the value of n"),
]
CASES = [
    *[("chat/completions", {**CHAT, **body}, param, text) for body, param, text in BOTH],
    *[("completions", {**PLAIN, **body}, param, text) for body, param, text in BOTH],
    *[("chat/completions", {**CHAT, **body}, param, text) for body, param, text in CHAT_ONLY],
    *[("completions", {**PLAIN, **body}, param, text) for body, param, text in PLAIN_ONLY],
]


@pytest.mark.parametrize(("path", "body", "param", "text"), CASES)
def test_a_refusal_names_the_field(
    path: str, body: dict[str, Any], param: str, text: str, url: str, engine: FakeEngine
) -> None:
    before = len(engine.requests)
    response = httpx.post(f"{url}/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert text in error["message"]
    assert len(engine.requests) == before


@pytest.mark.parametrize("model", ["nobody", "a/b/c", "../x", "", "x y", "versions"])
def test_unknown_models(model: str, url: str) -> None:
    for path, body in (("chat/completions", CHAT), ("completions", PLAIN)):
        for more, param in (({"model": model}, "model"), ({"adapter": model}, "adapter")):
            response = httpx.post(f"{url}/v1/{path}", json={**body, **more})
            assert response.status_code == 404
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("model_not_found", param)


def test_other_statuses(url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/ready").status_code == 200
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405)):
        response = httpx.request(method, f"{url}{path}")
        assert response.status_code == status and response.json()["error"]["message"]
    large = b'{"prompt": "' + b"x" * (9 << 20)
    for content in (large, iter([large])):
        response = httpx.post(f"{url}/v1/completions", content=content)
        assert response.status_code == 413 and response.json()["error"]["message"]


def test_an_address_that_is_taken_is_named(url: str) -> None:
    port = int(url.rpartition(":")[2])

    def load(lifecycle: Lifecycle) -> FastAPI:
        raise AssertionError("nothing is loaded for an address that cannot be had")

    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {port}"):
        run.run_server(load, ListenConfig(port=port))


def test_small_writes_are_sent_at_once() -> None:
    """With Nagle's algorithm each event of a stream would wait for the last one's receipt."""

    async def nodelay_of_an_accepted_connection() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with run._listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accept, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                try:
                    return await accepted
                finally:
                    writer.close()
                    await writer.wait_closed()

    assert asyncio.run(nodelay_of_an_accepted_connection())

"""Chat completions on an engine without a model: streams, their ends, and who closes what."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, served, wait_until
from openai import APIError, AsyncOpenAI, OpenAI, RateLimitError

from lorasb_runtime.errors import EngineError, InputError, OverloadedError, StoreError
from lorasb_server.app import create_app
from lorasb_server.settings import ServerConfig

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": "pico", "messages": MESSAGES}


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    config = ServerConfig("pico", ("an-alias",), max_n=4)
    with served(create_app(engine, None, config)) as url:
        assert engine.started
        yield url
    assert not engine.started


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def payloads(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    text = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True}).text
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_streamed_and_whole_answers_are_the_same(client: OpenAI, engine: FakeEngine) -> None:
    whole = client.chat.completions.create(
        model="pico", messages=MESSAGES, n=3, logprobs=True, top_logprobs=2
    )
    stream = client.chat.completions.create(
        model="pico",
        messages=MESSAGES,
        n=3,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    text = ["", "", ""]
    logprobs: list[list[Any]] = [[], [], []]
    for chunk in stream:
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += (choice.logprobs and choice.logprobs.content) or []
        usage = chunk.usage
    assert text == [c.message.content for c in whole.choices]
    assert text == [engine.says(engine.requests[0], index) for index in range(3)]
    assert [c.logprobs and c.logprobs.content for c in whole.choices] == logprobs
    assert usage == whole.usage and usage
    assert usage.prompt_tokens == len(engine.requests[0].prompt)
    assert usage.completion_tokens == sum(len(entries) for entries in logprobs)
    assert (engine.open, engine.finished, engine.aborted) == (0, 2, 0)


def test_the_async_client_reads_the_same(url: str, client: OpenAI) -> None:
    whole = client.chat.completions.create(model="an-alias", messages=MESSAGES)

    async def streamed() -> str:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as openai:
            stream = await openai.chat.completions.create(
                model="an-alias", messages=MESSAGES, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(streamed()) == whole.choices[0].message.content
    assert (whole.model, whole.choices[0].finish_reason) == ("an-alias", "stop")


def test_the_chunks_of_a_stream(url: str) -> None:
    plain = payloads(url, {**CHAT, "max_tokens": 30})
    deltas = [p["choices"][0]["delta"] for p in plain]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(delta["content"] for delta in deltas[1:-1])
    assert [p["choices"][0]["finish_reason"] for p in plain] == [None] * (len(plain) - 1) + [
        "length"
    ]
    assert not any("usage" in p for p in plain)
    counted = payloads(url, {**CHAT, "max_tokens": 30, "stream_options": {"include_usage": True}})
    assert [p["usage"] for p in counted[:-1]] == [None] * (len(counted) - 1)
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"]["completion_tokens"] == 30


def test_tokens_without_text_keep_their_logprobs(url: str, engine: FakeEngine) -> None:
    events = payloads(url, {**CHAT, "logprobs": True})
    entries = [
        entry
        for event in events
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    text = engine.says(engine.requests[0], 0)
    assert "é" in text
    assert len(entries) == len(text.encode()) + 1  # the end token too
    assert [entry["bytes"] for entry in entries].count(None) == 2 * text.count("é")
    assert all(bytes(e["bytes"]).decode() == e["token"] for e in entries if e["bytes"])


def test_a_stop_string_ends_the_answer(client: OpenAI, engine: FakeEngine) -> None:
    free = client.chat.completions.create(**CHAT).choices[0].message.content or ""
    stop = free[7:10]
    answer = client.chat.completions.create(**CHAT, stop=["never", stop])
    assert answer.choices[0].message.content == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert engine.requests[-1].sampling.stop == ("never", stop)


def test_every_field_reaches_the_engine(url: str, engine: FakeEngine) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "seed": 3,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    more = {"max_completion_tokens": 9, "logit_bias": {"5": -2}, "stop_token_ids": [7], "user": "u"}
    body = {**CHAT, **given, **more, "response_format": {"type": "text"}, "stop": "x"}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    sampling = engine.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert (sampling.max_tokens, sampling.logit_bias) == (9, {5: -2.0})
    assert (sampling.stop, sampling.stop_token_ids) == (("x",), (7,))
    nulls = dict.fromkeys([*given, *more, "n", "stop", "stream", "stream_options", "adapter"])
    assert httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **nulls}).status_code == 200
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200
    assert engine.requests[-2].sampling == engine.requests[-1].sampling
    assert engine.requests[-1].sampling.temperature == 1.0


def test_developer_is_system_and_parts_are_text(url: str, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]
    for messages in (
        [{"role": "system", "content": "Be brief"}, *MESSAGES],
        [{"role": "developer", "content": parts}, *MESSAGES],
    ):
        body = {"model": "pico", "messages": messages}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    assert engine.requests[0].prompt == engine.requests[1].prompt


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_generator(
    stream: bool, url: str, engine: FakeEngine
) -> None:
    engine.pace = 0.05
    body = {**CHAT, "n": 3, "ignore_eos": True, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()  # kept: the connection ends with it
            next(lines)
            assert engine.open == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.3)
    wait_until(lambda: engine.open == 0, 2.0)
    assert (engine.finished, engine.aborted) == (0, 1)


@pytest.mark.parametrize(
    ("error", "message"), [(EngineError("it broke"), "it broke"), (ValueError("x"), "internal")]
)
def test_an_error_inside_a_stream_is_its_last_event(
    error: Exception, message: str, url: str, client: OpenAI, engine: FakeEngine
) -> None:
    engine.error, engine.fail_after = error, 5
    last = payloads(url, CHAT)[-1]["error"]
    assert message in last["message"] and last["type"] == "server_error"
    stream = client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(APIError, match=message):
        list(stream)
    assert engine.open == 0 and engine.aborted == 2


@pytest.mark.parametrize(
    ("error", "status", "kind", "message"),
    [
        (OverloadedError("full"), 429, "rate_limit_error", "full"),
        (EngineError("it broke"), 500, "server_error", "it broke"),
        (StoreError("no store"), 503, "server_error", "no store"),
        (InputError("not like this"), 400, "invalid_request_error", "not like this"),
        (ValueError("a secret"), 500, "server_error", "internal error"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_failures_have_their_status_before_a_stream_starts(
    stream: bool,
    error: Exception,
    status: int,
    kind: str,
    message: str,
    url: str,
    engine: FakeEngine,
) -> None:
    engine.error = error
    response = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == status
    assert response.json()["error"] == {
        "message": message,
        "type": kind,
        "param": None,
        "code": None,
    }
    assert (response.headers.get("retry-after") is not None) == (status == 429)
    assert engine.open == 0


def test_the_openai_client_sees_its_own_rate_limit_error(
    client: OpenAI, engine: FakeEngine
) -> None:
    engine.error = OverloadedError("full")
    with pytest.raises(RateLimitError):
        client.chat.completions.create(**CHAT)

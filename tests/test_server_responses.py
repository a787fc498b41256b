"""The Responses API on an engine without a model: events, settings echoed, refusals by name."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, served, wait_until
from openai import APIStatusError, OpenAI
from openai.types.responses import Response

from lorasb_runtime.errors import EngineError, InputError, OverloadedError
from lorasb_server.app import create_app
from lorasb_server.settings import ServerConfig

ASK: dict[str, Any] = {"model": "pico", "input": "Hi"}
LOGPROBS: Any = ["message.output_text.logprobs"]
ADDED = ["response.output_item.added", "response.content_part.added"]
DONE = ["output_text.done", "content_part.done", "output_item.done"]


@pytest.fixture(scope="module")
def engine(pico: Any) -> FakeEngine:
    return FakeEngine.of(pico)


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with served(create_app(engine, None, ServerConfig("pico"))) as url:
        yield f"{url}/v1"


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def broken(engine: FakeEngine) -> Iterator[FakeEngine]:
    """The engine, to be broken by the test and mended after it."""
    yield engine
    engine.error, engine.fail_after, engine.pace = None, 0, 0.0


def events_of(url: str, **body: Any) -> list[dict[str, Any]]:
    """A stream's events, which must be named, numbered and end with [DONE]."""
    text = httpx.post(f"{url}/responses", json={**ASK, **body, "stream": True}).text
    blocks = [block for block in text.split("\n\n") if block]
    assert blocks.pop() == "data: [DONE]"
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def test_a_whole_response(client: OpenAI, engine: FakeEngine) -> None:
    response = client.responses.create(**ASK)
    request = engine.requests[-1]
    assert response.output_text == engine.says(request, 0)
    assert (response.status, response.model, response.object) == ("completed", "pico", "response")
    assert response.id.startswith("resp_") and response.completed_at
    (item,) = response.output
    assert item.type == "message" and item.role == "assistant" and item.status == "completed"
    assert response.usage
    assert response.usage.input_tokens == len(request.prompt)
    assert response.usage.total_tokens == len(request.prompt) + response.usage.output_tokens
    assert response.usage.input_tokens_details.cached_tokens == 0
    raw = httpx.post(str(client.base_url) + "responses", json=ASK).json()
    assert raw["store"] is False
    Response.model_validate(raw, strict=True)


def test_the_events_of_a_stream(url: str, engine: FakeEngine) -> None:
    events = events_of(url)
    kinds = [event["type"] for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", *ADDED]
    assert kinds[-4:] == [*(f"response.{kind}" for kind in DONE), "response.completed"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    says = engine.says(engine.requests[-1], 0)
    assert "".join(event["delta"] for event in events[4:-4]) == says
    last = events[-1]["response"]
    assert events[0]["response"] == {**last, "status": "in_progress", "output": []} | dict.fromkeys(
        ("usage", "completed_at")
    )
    (item,) = last["output"]
    assert events[-2]["item"] == item and events[-3]["part"] == item["content"][0]
    assert events[-4]["text"] == says == item["content"][0]["text"]
    assert {event.get("item_id", item["id"]) for event in events[3:-2]} == {item["id"]}
    assert events[2]["item"] == {**item, "status": "in_progress", "content": []}


def test_streamed_and_whole_responses_are_the_same(client: OpenAI) -> None:
    settings: dict[str, Any] = {**ASK, "include": LOGPROBS, "top_logprobs": 2}
    whole = client.responses.create(**settings)
    with client.responses.stream(**settings) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
        streamed = stream.get_final_response()
    assert streamed.output_text == whole.output_text == "".join(d.delta for d in deltas)
    assert streamed.usage == whole.usage and whole.usage
    texts = [r.output[0].content[0] for r in (streamed, whole)]  # type: ignore[union-attr]
    shown, expected = (text.logprobs for text in texts)  # type: ignore[union-attr]
    assert [entry.token for entry in shown or []] == [entry.token for entry in expected or []]
    assert len(expected or []) == whole.usage.output_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in expected or [])
    assert sum(len(d.logprobs) for d in deltas) == whole.usage.output_tokens - 1  # the end token


def test_an_answer_cut_short_is_incomplete(client: OpenAI, url: str) -> None:
    response = client.responses.create(**ASK, max_output_tokens=3)
    assert response.status == "incomplete" and response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert response.usage and response.usage.output_tokens == 3
    last = events_of(url, max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete" and last["response"]["status"] == "incomplete"


def test_items_instructions_and_parts_are_a_chat(client: OpenAI, engine: FakeEngine) -> None:
    def prompt_of(**body: Any) -> str:
        response = client.responses.create(**{**ASK, **body})
        assert response.status == "completed"
        return engine.codec.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)

    first = client.responses.create(**ASK)
    assert prompt_of() == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": part} for part in ("H", "i")]},
        *first.output,
        {"type": "message", "role": "developer", "content": "Be brief"},
    ]
    assert prompt_of(input=turns, instructions="Be kind") == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n{first.output_text}<|im_end|>\n"
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>assistant\n"
    )


def test_settings_reach_the_engine_and_are_shown(client: OpenAI, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    shown: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "instructions": "Be brief",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "user": "u",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "parallel_tool_calls": False,
        "truncation": "disabled",
    }
    form: Any = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    extra = {"top_k": 7, "stop": ["x"], "seed": 3, "min_tokens": 2, "logit_bias": {"5": -2}}
    response = client.responses.create(
        **ASK, **shown, text={"format": form}, store=False, service_tier="auto", extra_body=extra
    )
    assert {name: getattr(response, name) for name in shown} == shown
    assert response.service_tier == "default"
    assert response.text and response.text.format
    assert response.text.format.to_dict() == {**form, "description": None}
    sampling = engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 9)
    assert (sampling.top_k, sampling.stop, sampling.seed) == (7, ("x",), 3)
    assert (sampling.min_tokens, sampling.logit_bias) == (2, {5: -2.0})
    assert sampling.grammar and json.loads(sampling.grammar.text) == schema
    client.responses.create(**ASK)
    plain = engine.requests[-1].sampling
    nulls = dict.fromkeys((*shown, *extra, "text", "tools", "reasoning", "previous_response_id"))
    client.responses.create(**ASK, extra_body=nulls)
    assert engine.requests[-1].sampling == plain
    client.responses.create(**ASK, text={"format": {"type": "json_object"}})
    assert engine.requests[-1].sampling.grammar


FORM = {"type": "json_schema", "name": "answer"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"store": True}, "store", "keeps no responses"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
    ({"conversation": {"id": "c"}}, "conversation", "keeps no responses"),
    ({"background": True}, "background", "False"),
    ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
    ({"prompt": {"id": "p"}}, "prompt", "not supported"),
    ({"max_tool_calls": 1}, "max_tool_calls", "not supported"),
    ({"n": 2}, "n", "not supported"),
    ({"max_tokens": 2}, "max_tokens", "not supported"),
    ({"truncation": "auto"}, "truncation", "'disabled'"),
    ({"service_tier": "flex"}, "service_tier", "'default'"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "'medium'"),
    ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
    ({"include": ["reasoning.encrypted_content"]}, "include.0", "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs", "only allowed with include"),
    ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs", "less than or equal"),
    ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "with stream"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "False"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal"),
    ({"max_output_tokens": 3, "min_tokens": 4}, "min_tokens", "over max_output_tokens"),
    ({"max_output_tokens": 999}, "max_output_tokens", "context length"),
    ({"input": "x" * 300}, "input", "context length"),
    ({"input": []}, "input", "at least 1"),
    ({"input": 5}, "input", "a string or a list"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "item_reference"),
    ({"input": [{"role": "tool", "content": ""}]}, "input.0.role", "tool"),
    ({"input": [{"role": "user", "content": None}]}, "input.0.content", "a string or a list"),
    ({"model": 5}, "model", "valid string"),
    ({"user": "\ud800"}, "user", "valid Unicode"),
    ({"text": {"format": {**FORM, "schema": {"minimum": math.nan}}}}, "text.format", "finite"),
    ({"text": {"format": {**FORM, "schema": {"const": "\ud800"}}}}, "text.format", "Unicode"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input.0.content.0",
        "input_image",
    ),
    (
        {
            "text": {"format": {"type": "json_object"}},
            "structured_outputs": {"regex": "a"},
        },
        "structured_outputs",
        "not allowed with text.format",
    ),
]


@pytest.mark.parametrize(("body", "param", "text"), REFUSED)
def test_refusals_name_the_field(
    body: dict[str, Any], param: str, text: str, url: str, engine: FakeEngine
) -> None:
    before = len(engine.requests)
    content = json.dumps({**ASK, **body})  # httpx would refuse what is no JSON
    response = httpx.post(
        f"{url}/responses", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param) and text in error["message"]
    assert len(engine.requests) == before


@pytest.mark.parametrize("stream", [True, False])
def test_failures_have_their_status_before_a_response_starts(
    stream: bool, url: str, broken: FakeEngine
) -> None:
    broken.error = OverloadedError("full")
    response = httpx.post(f"{url}/responses", json={**ASK, "stream": stream})
    assert response.status_code == 429 and response.headers["retry-after"]
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert broken.open == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineError("it broke"), "server_error", "it broke"),
        (OverloadedError("full"), "rate_limit_exceeded", "full"),
        (InputError("not so"), "invalid_prompt", "not so"),
        (ValueError("a secret"), "server_error", "internal error"),
    ],
)
def test_an_error_inside_a_stream_fails_the_response(
    error: Exception, code: str, message: str, url: str, broken: FakeEngine
) -> None:
    broken.error, broken.fail_after = error, 5
    last = events_of(url)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": code, "message": message}
    assert broken.open == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_generator(
    stream: bool, url: str, broken: FakeEngine
) -> None:
    broken.pace, before = 0.05, broken.aborted
    body = {**ASK, "ignore_eos": True, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{url}/responses", json=body) as response:
            lines = response.iter_lines()  # kept: the connection ends with it
            assert next(lines) == "event: response.created"
            assert broken.open == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/responses", json=body, timeout=0.3)
    wait_until(lambda: broken.open == 0, 2.0)
    assert broken.aborted == before + 1


def test_unknown_models_and_kept_responses_are_not_found(client: OpenAI) -> None:
    for ask in (
        lambda: client.responses.create(model="nobody", input="Hi"),
        lambda: client.responses.create(**ASK, extra_body={"adapter": "nobody"}),
        lambda: client.responses.retrieve("resp_1"),
    ):
        with pytest.raises(APIStatusError) as caught:
            ask()
        assert caught.value.status_code == 404

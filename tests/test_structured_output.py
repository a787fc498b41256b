"""Structured output and prompt log-probabilities over HTTP, on the pico model, as users ask."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel
from serving import serving

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


class Answer(BaseModel):
    mood: Literal["calm", "stormy"]
    fine: bool


@pytest.fixture(scope="module")
def url(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("structured") / "serve.log"
    with serving(log, pico, "--served-model-name", "pico", "--dtype", "float32") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("temperature", [0, 1])
def test_parse_gives_the_pydantic_model(client: OpenAI, temperature: int) -> None:
    parsed = client.beta.chat.completions.parse(
        model="pico",
        messages=MESSAGES,
        response_format=Answer,
        max_tokens=200,
        temperature=temperature,
        seed=1,
    )
    choice = parsed.choices[0]
    assert isinstance(choice.message.parsed, Answer)
    assert choice.finish_reason == "stop"


def test_a_stream_conforms_too(client: OpenAI) -> None:
    schema = {"name": "n", "schema": {"type": "integer", "minimum": 10, "maximum": 99}}
    stream = client.chat.completions.create(
        model="pico",
        messages=MESSAGES,
        stream=True,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert 10 <= json.loads(text) <= 99


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]"}, "[0-9]{3}-[a-f]"),
        ({"choice": ["red", 'blu"e']}, 'red|blu"e'),
        ({"json": {"enum": [7, 8]}}, "7|8"),
        ({"grammar": 'start: "a" | "b"'}, "a|b"),
    ],
)
def test_structured_outputs(client: OpenAI, structured: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(
        model="pico", prompt="x", n=2, max_tokens=30, extra_body={"structured_outputs": structured}
    )
    assert all(re.fullmatch(pattern, choice.text) for choice in answer.choices)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "regex: found one that cannot be used"),
        ({"structured_outputs": {}}, "found 0 of json, regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "found 2 of json, regex"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "not allowed with response_format",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "nothing"}},
                }
            },
            "json_schema: found one that cannot be used",
        ),
        ({"prompt_logprobs": 1, "stream": True}, "not allowed with stream"),
    ],
)
def test_what_cannot_be_used_is_refused(client: OpenAI, more: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError) as error:
            client.chat.completions.create(
                model="pico", messages=MESSAGES, extra_body={"stream": stream, **more}
            )
        assert message in error.value.message


def test_prompt_logprobs_and_cached_tokens(url: str) -> None:
    body = {"model": "pico", "prompt": "The sea is wide and cold", "max_tokens": 1}
    first = httpx.post(f"{url}/v1/completions", json={**body, "prompt_logprobs": 1}).json()
    shown = first["choices"][0]["prompt_logprobs"]
    assert shown[0] is None and len(shown) == first["usage"]["prompt_tokens"]
    for entry in shown[1:]:
        ranks = [value["rank"] for value in entry.values()]
        assert 1 in ranks and all(math.isfinite(v["logprob"]) for v in entry.values())
    echo = {"echo": True, "logprobs": 1, "max_tokens": 0}
    echoed = httpx.post(f"{url}/v1/completions", json={**body, **echo}).json()["choices"][0]
    assert echoed["text"] == body["prompt"]
    tops = echoed["logprobs"]["top_logprobs"]
    for entry, top, text in zip(shown[1:], tops[1:], echoed["logprobs"]["tokens"][1:], strict=True):
        values = {value["decoded_token"]: value["logprob"] for value in entry.values()}
        assert top == pytest.approx(values) and text in top
    again = httpx.post(f"{url}/v1/completions", json=body).json()
    assert "prompt_logprobs" not in again["choices"][0]
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}

"""Real clients on one real server: the `openai` package, sync and async, and the `llm` command."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from bases import random_adapter, random_basis
from openai import AsyncOpenAI, NotFoundError, OpenAI
from pydantic import BaseModel
from serving import lorasb, serving

from lorasb_runtime.storage.adapter_file import save_adapter
from lorasb_runtime.storage.basis_file import save_basis

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
PLAIN: dict[str, Any] = {"prompt": "Hi", "temperature": 0, "max_tokens": 12}
RESPONSE: dict[str, Any] = {"input": "Hi", "temperature": 0, "max_output_tokens": 12}
MODELS = ("pico", "alice")


class Weather(BaseModel):
    """Whatever a random model picks, it ends soon."""

    sky: Literal["clear", "grey"]
    windy: bool


@pytest.fixture(scope="module")
def url(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("clients")
    basis = random_basis(pico)
    save_basis(basis, folder / "basis.safetensors")
    save_adapter(random_adapter(basis, 0), folder / "alice.safetensors")
    lorasb("publish", folder / "alice.safetensors", folder / "store", "alice")
    words = ("--basis", folder / "basis.safetensors", "--adapters", folder / "store")
    with serving(folder / "serve.log", pico, *words, "--dtype", "float32") as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_models_and_their_parent(client: OpenAI) -> None:
    base, alice = client.models.list().data
    assert (base.id, base.object, base.owned_by) == ("pico", "model", "lorasb")
    assert base.model_extra and base.model_extra["parent"] is None
    assert alice.id == "alice" and client.models.retrieve("alice") == alice
    assert alice.model_extra and alice.model_extra["parent"] == alice.model_extra["root"] == "pico"
    assert client.models.retrieve("pico") == base
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def said(client: OpenAI, model: str) -> dict[str, str]:
    """The whole answers of one model on the three endpoints, which agree on what a chat says."""
    chat = client.chat.completions.create(model=model, **CHAT)
    plain = client.completions.create(model=model, **PLAIN)
    response = client.responses.create(model=model, **RESPONSE)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage and chat.usage
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    return {"chat": response.output_text, "plain": plain.choices[0].text}


def test_streams_say_what_whole_answers_say(client: OpenAI) -> None:
    answers = []
    for model in MODELS:
        whole = said(client, model)
        chat = client.chat.completions.create(model=model, **CHAT, stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in chat if c.choices)
        plain = client.completions.create(model=model, **PLAIN, stream=True)
        assert {"chat": text, "plain": "".join(c.choices[0].text for c in plain)} == whole
        events = client.responses.create(model=model, **RESPONSE, stream=True)
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(deltas) == whole["chat"]
        answers.append(whole)
    assert answers[0] != answers[1]


def test_usage_tells_the_cached_tokens(client: OpenAI) -> None:
    said(client, "alice")  # now the prompt is in the cache
    chat = client.chat.completions.create(model="alice", **CHAT).usage
    response = client.responses.create(model="alice", **RESPONSE).usage
    assert chat and chat.prompt_tokens_details and response
    cached = chat.prompt_tokens_details.cached_tokens
    assert cached and cached == response.input_tokens_details.cached_tokens
    assert response.total_tokens == response.input_tokens + response.output_tokens


def test_the_async_client_reads_the_same(url: str, client: OpenAI) -> None:
    async def ask(openai: AsyncOpenAI, model: str) -> dict[str, str]:
        chat, plain, response = await asyncio.gather(
            openai.chat.completions.create(model=model, **CHAT),
            openai.completions.create(model=model, **PLAIN),
            openai.responses.create(model=model, **RESPONSE),
        )
        assert response.output_text == chat.choices[0].message.content
        return {"chat": response.output_text, "plain": plain.choices[0].text}

    async def stream(openai: AsyncOpenAI, model: str) -> dict[str, str]:
        chat, plain = "", ""
        async for chunk in await openai.chat.completions.create(model=model, **CHAT, stream=True):
            chat += chunk.choices[0].delta.content or ""
        async for part in await openai.completions.create(model=model, **PLAIN, stream=True):
            plain += part.choices[0].text
        async with openai.responses.stream(model=model, **RESPONSE) as events:
            kinds = [event.type async for event in events]
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete")
        return {"chat": chat, "plain": plain}

    async def both() -> list[dict[str, str]]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as openai:
            assert [model.id async for model in openai.models.list()] == list(MODELS)
            asked = [how(openai, model) for model in MODELS for how in (ask, stream)]
            return await asyncio.gather(*asked)

    expected = [said(client, model) for model in MODELS for _ in range(2)]
    assert asyncio.run(both()) == expected


def test_answers_are_parsed_into_a_pydantic_model(url: str, client: OpenAI) -> None:
    beta = client.beta.chat.completions.parse(
        model="alice", messages=MESSAGES, response_format=Weather
    )
    chat = client.chat.completions.parse(model="alice", messages=MESSAGES, response_format=Weather)
    response = client.responses.parse(model="alice", input="Hi", text_format=Weather)
    with client.responses.stream(model="alice", input="Hi", text_format=Weather) as stream:
        streamed = stream.get_final_response()
    with client.chat.completions.stream(
        model="alice", messages=MESSAGES, response_format=Weather
    ) as chunks:
        completion = chunks.get_final_completion()

    async def asked() -> Any:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as openai:
            return await openai.responses.parse(model="alice", input="Hi", text_format=Weather)

    for parsed in (
        *(c.choices[0].message.parsed for c in (beta, chat, completion)),
        *(r.output_parsed for r in (response, streamed, asyncio.run(asked()))),
    ):
        assert isinstance(parsed, Weather)


@pytest.mark.parametrize("form", ["chat", "completion", "responses"])
def test_the_llm_command_asks_and_streams(
    form: str, url: str, client: OpenAI, tmp_path: Path
) -> None:
    model = {"model_id": "mine", "model_name": "alice", "api_base": url, form: True}
    model.pop("chat", None)
    # YAML, of which JSON is a part.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    command = [sys.executable, "-m", "llm", "-m", "mine", "--key", "none", "Hi"]
    command += ["-o", "temperature", "0", "-o", "max_tokens", "12"]
    expected = said(client, "alice")["plain" if form == "completion" else "chat"]
    for more in ((), ("--no-stream",)):
        result = subprocess.run(
            [*command, *more],
            capture_output=True,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode().strip() == expected.strip()

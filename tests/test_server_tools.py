"""Tool calls over HTTP with OpenAI's client: read from what an engine says, and forced on one."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine, served
from openai import OpenAI
from pico import make_pico_llama
from serving import serving

from lorasb_runtime.engines.base import GenerationRequest
from lorasb_server.app import create_app
from lorasb_server.settings import ServerConfig

QUESTION: list[Any] = [{"role": "user", "content": "Add"}]
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": NUMBER},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
SAID = 'I add. <tool_call>{"name": "add", "arguments": {"a": 12}}</tool_call>'


@pytest.fixture
def talker(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAI]:
    """An engine that always says the same; its template takes no tools."""

    def says(request: GenerationRequest, index: int) -> str:
        return SAID

    monkeypatch.setattr(engine, "says", says)
    engine.info = type(engine.info)(2048, 259, "float32")
    with (
        served(create_app(engine, None, ServerConfig("pico", ()))) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_call_is_told_whole_and_streamed(talker: OpenAI, engine: FakeEngine) -> None:
    whole = talker.chat.completions.create(model="pico", messages=QUESTION, tools=[ADD]).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "I add."
    assert whole.message.tool_calls
    call: Any = whole.message.tool_calls[0]
    assert (call.type, call.function.name, call.function.arguments) == (
        "function",
        "add",
        '{"a": 12}',
    )
    prompt = engine.codec.decode(list(engine.requests[0].prompt), skip_special_tokens=False)
    assert '"name": "add"' in prompt and "<tools>" in prompt
    with talker.chat.completions.stream(model="pico", messages=QUESTION, tools=[ADD]) as stream:
        for _ in stream:
            pass
        last = stream.get_final_completion().choices[0]
    assert last.finish_reason == "tool_calls" and last.message.content == "I add."
    assert last.message.tool_calls
    assert last.message.tool_calls[0].function.arguments == '{"a": 12}'


def test_a_turn_of_calls_goes_back_in(talker: OpenAI, engine: FakeEngine) -> None:
    whole = talker.chat.completions.create(model="pico", messages=QUESTION, tools=[ADD])
    message = whole.choices[0].message
    assert message.tool_calls
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "13"}
    turns: Any = [*QUESTION, message.model_dump(exclude_none=True), answer]
    talker.chat.completions.create(model="pico", messages=turns, tools=[ADD])
    prompt = engine.codec.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)
    assert "<tool_response>\n13" in prompt and '{"name": "add", "arguments": {"a": 12}}' in prompt


def test_without_tools_nothing_is_read(talker: OpenAI, engine: FakeEngine) -> None:
    for more in ({}, {"tools": [ADD], "tool_choice": "none"}):
        choice = talker.chat.completions.create(model="pico", messages=QUESTION, **more).choices[0]
        assert (choice.message.content, choice.finish_reason) == (SAID, "stop")
        assert choice.message.tool_calls is None
    prompts = {request.prompt for request in engine.requests}
    assert len(prompts) == 1


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("tools")
    model = make_pico_llama(folder / "pico", max_position_embeddings=1024)
    with (
        serving(folder / "log", model, "--dtype", "float32") as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_forced_on_any_model(client: OpenAI, stream: bool) -> None:
    forms: list[tuple[Any, str]] = [
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "add"}}, "stop"),
    ]
    for choice, reason in forms:
        args: dict[str, Any] = {"tools": [ADD], "tool_choice": choice, "messages": QUESTION}
        if stream:
            with client.chat.completions.stream(model="pico", **args) as events:
                found: Any = events.get_final_completion().choices[0]
        else:
            found = client.chat.completions.create(model="pico", **args).choices[0]
        assert found.finish_reason == reason, found
        call = found.message.tool_calls[0]
        assert call.function.name == "add"
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == {"a"} and 0 <= arguments["a"] < 100

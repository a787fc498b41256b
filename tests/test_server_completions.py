"""Plain completions on an engine without a model: many prompts, their places, their failures."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, served, wait_until
from openai import InternalServerError, OpenAI

from lorasb_runtime.errors import EngineError
from lorasb_server.app import create_app
from lorasb_server.settings import ServerConfig


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with served(create_app(engine, None, ServerConfig("pico"))) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_four_forms_of_a_prompt(client: OpenAI, engine: FakeEngine) -> None:
    one, two = engine.codec.encode("one"), engine.codec.encode("two")
    forms: list[Any] = ["one", one, ["one", "two"], [one, two]]
    for prompt in forms:
        client.completions.create(model="pico", prompt=prompt)
    expected = [tuple(one), tuple(one), tuple(one), tuple(two), tuple(one), tuple(two)]
    assert [request.prompt for request in engine.requests] == expected
    assert {request.sampling.max_tokens for request in engine.requests} == {16}


def test_prompts_and_completions_keep_their_places(client: OpenAI, engine: FakeEngine) -> None:
    prompts = ["a", "bc", "def"]
    more: dict[str, Any] = {"prompt": prompts, "n": 2, "max_tokens": 9, "logprobs": 1}
    whole = client.completions.create(model="pico", **more)
    said = [engine.says(request, i)[:8] for request in engine.requests[:3] for i in range(2)]
    assert [c.index for c in whole.choices] == list(range(6))
    assert all(c.text.startswith(s[:4]) for c, s in zip(whole.choices, said, strict=True))
    assert whole.usage and whole.usage.prompt_tokens == 6
    assert whole.usage.completion_tokens == 6 * 9
    stream = client.completions.create(
        model="pico", **more, stream=True, stream_options={"include_usage": True}
    )
    text, offsets, reasons, last = [""] * 6, [[] for _ in range(6)], [""] * 6, None
    for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            text[choice.index] += choice.text
            if choice.logprobs:
                offsets[choice.index] += choice.logprobs.text_offset or []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert text == [c.text for c in whole.choices]
    assert offsets == [c.logprobs.text_offset for c in whole.choices if c.logprobs]
    assert reasons == ["length"] * 6
    assert last and last.choices == [] and last.usage == whole.usage


def test_the_chosen_token_is_among_the_top_ones(client: OpenAI) -> None:
    answer = client.completions.create(model="pico", prompt="x", logprobs=0, max_tokens=5)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.top_logprobs
    assert [list(top) for top in logprobs.top_logprobs] == [[token] for token in logprobs.tokens]
    assert logprobs.token_logprobs == [-0.5] * 5


def test_echo_puts_the_prompt_before_each_completion(client: OpenAI, engine: FakeEngine) -> None:
    tokens = engine.codec.encode("token ids")
    plain = client.completions.create(model="pico", prompt=["a b", "cd"], n=2)
    echoed = client.completions.create(model="pico", prompt=["a b", "cd"], n=2, echo=True)
    prompts = ["a b", "a b", "cd", "cd"]
    said = [p + c.text for p, c in zip(prompts, plain.choices, strict=True)]
    assert [c.text for c in echoed.choices] == said
    assert echoed.usage == plain.usage
    decoded = client.completions.create(model="pico", prompt=tokens, echo=True, max_tokens=0)
    assert decoded.choices[0].text == "token ids"


def test_echo_scores_the_prompt_also_in_a_stream(client: OpenAI, engine: FakeEngine) -> None:
    more: dict[str, Any] = {"prompt": ["ab", "c"], "n": 2, "echo": True, "logprobs": 1}
    more |= {"model": "pico", "max_tokens": 3}
    whole = client.completions.create(**more).choices
    for choice, prompt in zip(whole, ["ab", "ab", "c", "c"], strict=True):
        logprobs = choice.logprobs
        assert logprobs and logprobs.tokens and logprobs.top_logprobs and logprobs.text_offset
        count = len(engine.codec.encode(prompt))
        assert logprobs.token_logprobs == [None, *[-0.25] * (count - 1), *[-0.5] * 3]
        assert logprobs.top_logprobs[0] is None
        assert logprobs.top_logprobs[1:count] == [{t: -0.25} for t in logprobs.tokens[1:count]]
        assert "".join(logprobs.tokens).startswith(prompt) and logprobs.text_offset[0] == 0
    text, scores = [""] * 4, [[] for _ in range(4)]
    for chunk in client.completions.create(**more, stream=True):
        for piece in chunk.choices:
            text[piece.index] += piece.text
            if piece.logprobs:
                scores[piece.index] += piece.logprobs.token_logprobs or []
    assert text == [choice.text for choice in whole]
    assert scores == [choice.logprobs.token_logprobs for choice in whole if choice.logprobs]


def test_a_prompt_is_scored_without_generating(client: OpenAI) -> None:
    more: dict[str, Any] = {"model": "pico", "prompt": "abc", "echo": True, "max_tokens": 0}
    answer = client.completions.create(**more, logprobs=1)
    choice, usage = answer.choices[0], answer.usage
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs and choice.logprobs.tokens and usage
    assert len(choice.logprobs.tokens) == usage.prompt_tokens
    assert (usage.completion_tokens, usage.total_tokens) == (0, usage.prompt_tokens)
    chunks = list(client.completions.create(**more, stream=True))
    assert [(c.choices[0].text, c.choices[0].finish_reason) for c in chunks] == [("abc", "length")]


def test_one_failing_prompt_closes_the_others(client: OpenAI, engine: FakeEngine) -> None:
    engine.error, engine.fail_after, engine.fail_on = EngineError("it broke"), 3, "bad"
    engine.pace = 0.02
    with pytest.raises(InternalServerError, match="it broke"):
        client.completions.create(model="pico", prompt=["good", "bad", "fine"], max_tokens=200)
    wait_until(lambda: engine.open == 0, 2.0)
    assert (engine.finished, engine.aborted) == (0, 3)


def test_the_default_limit_shrinks_to_the_context(client: OpenAI) -> None:
    """Of 256 tokens 250 are the prompt's; only a limit that was asked for is refused."""
    answer = client.completions.create(model="pico", prompt="x" * 250)
    assert answer.usage and answer.usage.completion_tokens == 6
    with pytest.raises(Exception, match="context length is 256") as refusal:
        client.completions.create(model="pico", prompt="x" * 250, max_tokens=16)
    assert getattr(refusal.value, "code", None) == "context_length_exceeded"


def test_tokenize_and_detokenize(url: str, engine: FakeEngine) -> None:
    codec = engine.codec
    text = "Hé"
    for more, special in (({}, True), ({"add_special_tokens": False}, False)):
        body = httpx.post(f"{url}/tokenize", json={"prompt": text, **more}).json()
        tokens = codec.encode(text, special_tokens=special)
        assert body == {"count": len(tokens), "max_model_len": 256, "tokens": tokens}
    messages = [{"role": "user", "content": text}]
    for generation in (True, False):
        body = {"model": "pico", "messages": messages, "add_generation_prompt": generation}
        tokens = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
        assert tokens == codec.encode_chat(messages, add_generation_prompt=generation)
    ids = codec.encode(text)
    assert httpx.post(f"{url}/detokenize", json={"tokens": ids}).json() == {"prompt": text}


def test_metrics_count_what_was_served(url: str, client: OpenAI) -> None:
    client.completions.create(model="pico", prompt="abc", max_tokens=5)
    httpx.post(f"{url}/v1/completions", json={"model": "gone", "prompt": "x"})
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    for line in (
        'lorasb_requests_total{outcome="ok",path="/v1/completions",status="200"} 1.0',
        'lorasb_requests_total{outcome="refused",path="/v1/completions",status="404"} 1.0',
        "lorasb_prompt_tokens_total 3.0",
        "lorasb_generation_tokens_total 5.0",
        "lorasb_time_to_first_token_seconds_count 1.0",
        "lorasb_sequences_running 0.0",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("v1/completions", r'{"model": "pico", "prompt": "\ud800"}', "prompt"),
        ("v1/completions", r'{"model": "pico", "prompt": ["\ud800"]}', "prompt.0"),
        (
            "v1/chat/completions",
            r'{"model": "pico", "messages": [{"role": "user", "content": "\ud800"}]}',
            "messages.0.content",
        ),
        ("tokenize", r'{"prompt": "\ud800"}', "prompt"),
        ("detokenize", '{"tokens": [259]}', "tokens"),
        ("v1/completions", '{"model": "pico", "prompt": "x", "temperature": NaN}', "temperature"),
        ("v1/completions", "[]", None),
        ("v1/completions", "", None),
        ("v1/completions", "[" * 100_000, None),
    ],
)
def test_hostile_json_is_refused(path: str, body: str, param: str | None, url: str) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/{path}", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_long_list_of_wrong_entries_is_refused_at_its_first(url: str) -> None:
    """One error for each of a million entries would hold the server up for many seconds."""
    started = time.monotonic()
    response = httpx.post(
        f"{url}/v1/completions", json={"model": "pico", "prompt": [""] * 1_000_000}
    )
    assert response.status_code == 400
    assert time.monotonic() - started < 4

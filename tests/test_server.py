"""The server as a process of its own on the pico model, asked by real clients."""

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bases import random_adapter, random_basis
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from serving import LORASB, lorasb, serving

from lorasb_runtime.merging import METHODS
from lorasb_runtime.merging.checkpoint import merge_checkpoint
from lorasb_runtime.merging.method_deltas import method_deltas
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.models.load import load_causal_lm, load_tokenizer
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.storage.checkpoint import open_checkpoint

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
PROMPT = "The sea"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico, rank=4, scaling=0.5)


@pytest.fixture(scope="module")
def adapters(basis: Basis) -> dict[str, Adapter]:
    return {name: random_adapter(basis, i, name=name) for i, name in enumerate(("a", "b", "c"))}


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory, basis: Basis, adapters: dict[str, Adapter]
) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    save_basis(basis, folder / "basis.safetensors")
    for name, adapter in adapters.items():
        save_adapter(adapter, folder / f"{name}.safetensors")
    lorasb("publish", folder / "a.safetensors", folder / "store", "alice")
    lorasb("publish", folder / "b.safetensors", folder / "store", "team/bob")
    return folder


@pytest.fixture(scope="module")
def url(pico: Path, work: Path) -> Iterator[str]:
    flags = ("--basis", work / "basis.safetensors", "--adapters", work / "store")
    with serving(work / "serve.log", pico, *flags, "--dtype", "float32", "--refresh", 0.3) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def merged_text(
    pico: Path, basis: Basis, adapter: Adapter | None, prompt: list[int], count: int, to: Path
) -> str:
    """What Hugging Face's generate says on the merged checkpoint."""
    folder = pico
    if adapter is not None:
        folder = to / adapter.version
        deltas = method_deltas([WeightedAdapter(adapter)], basis, METHODS["linear"])
        merge_checkpoint(open_checkpoint(pico), basis, deltas, folder, provenance={}, force=True)
    model = load_causal_lm(folder, torch.float32)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=count, max_length=None
    )
    new = output[0, len(prompt) :].tolist()
    text: str = load_tokenizer(pico).decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def complete(client: OpenAI, model: str, **more: Any) -> str:
    answer = client.completions.create(model=model, **{"prompt": PROMPT, **GREEDY, **more})
    return answer.choices[0].text


def test_models_lists_the_base_first(client: OpenAI) -> None:
    models = client.models.list().data
    assert [m.id for m in models] == ["pico", "alice", "team/bob"]
    assert models[1].model_extra and models[1].model_extra["parent"] == "pico"
    assert client.models.retrieve("team/bob").id == "team/bob"
    with pytest.raises(NotFoundError):
        client.models.retrieve("carol")


@pytest.mark.parametrize(("name", "key"), [("pico", None), ("alice", "a"), ("team/bob", "b")])
def test_answers_are_those_of_the_merged_checkpoint(
    name: str,
    key: str | None,
    client: OpenAI,
    pico: Path,
    basis: Basis,
    adapters: dict[str, Adapter],
    tmp_path: Path,
) -> None:
    ids = load_tokenizer(pico).encode(PROMPT)
    adapter = adapters[key] if key else None
    expected = merged_text(pico, basis, adapter, ids, 24, tmp_path)
    assert complete(client, name, max_tokens=24) == expected
    assert complete(client, name, max_tokens=24, prompt=ids) == expected
    if adapter:
        assert complete(client, "pico", max_tokens=24, extra_body={"adapter": name}) == expected


def test_a_chat_goes_through_the_template(
    client: OpenAI, pico: Path, basis: Basis, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(pico)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    expected = merged_text(pico, basis, adapters["a"], ids, 12, tmp_path)
    answer = client.chat.completions.create(model="alice", messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == expected
    assert answer.usage and answer.usage.prompt_tokens == len(ids)
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    again = client.chat.completions.create(model="alice", messages=parts, **GREEDY)
    assert again.choices[0].message.content == expected


def test_a_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="alice", messages=MESSAGES, **GREEDY, logprobs=True, top_logprobs=2, n=2
    )
    stream = client.chat.completions.create(
        model="alice",
        messages=MESSAGES,
        **GREEDY,
        logprobs=True,
        top_logprobs=2,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, reasons, tokens = ["", ""], ["", ""], [0, 0]
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert text == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage and usage
    assert sum(tokens) == usage.completion_tokens


def test_the_wire_format_of_a_stream(url: str) -> None:
    body = {"model": "alice", "messages": MESSAGES, "stream": True, **GREEDY}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    payloads = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert payloads[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert payloads[-1]["choices"][0]["delta"] == {}
    assert all(p["choices"][0]["delta"].get("content") for p in payloads[1:-1])
    assert {p["object"] for p in payloads} == {"chat.completion.chunk"}
    assert len({p["id"] for p in payloads}) == 1


def test_several_prompts_and_completions_keep_their_places(client: OpenAI) -> None:
    prompts = ["one", "two", "three"]
    answer = client.completions.create(model="alice", prompt=prompts, n=2, **GREEDY)
    assert [c.index for c in answer.choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        single = complete(client, "alice", prompt=prompt)
        assert [c.text for c in answer.choices[2 * i : 2 * i + 2]] == [single, single]
    assert answer.usage and answer.usage.prompt_tokens == sum(len(p) for p in prompts)


def test_logprobs_of_completions_are_parallel_lists(client: OpenAI) -> None:
    answer = client.completions.create(model="pico", prompt=PROMPT, logprobs=2, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.token_logprobs and logprobs.text_offset
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert answer.usage and len(logprobs.tokens) == answer.usage.completion_tokens
    assert logprobs.text_offset[0] == 0
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])


def test_sampling_fields_reach_the_engine(url: str, client: OpenAI) -> None:
    free = complete(client, "pico", max_tokens=30, extra_body={"ignore_eos": True})
    assert free
    stop = free[5:7]
    assert complete(client, "pico", max_tokens=30, stop=stop) == free[: free.index(stop)]
    token = httpx.post(f"{url}/tokenize", json={"prompt": "A"}).json()["tokens"][0]
    assert complete(client, "pico", logit_bias={str(token): 100}) == "A" * 12
    hot = {"temperature": 1.5, "max_tokens": 10}
    assert complete(client, "pico", **hot, seed=3) == complete(client, "pico", **hot, seed=3)
    assert complete(client, "pico", **hot, seed=3) != complete(client, "pico", **hot, seed=4)
    one = complete(client, "pico", **hot, extra_body={"top_k": 1})
    assert one == complete(client, "pico", max_tokens=10)
    shown = complete(
        client, "pico", max_tokens=1, logit_bias={"2": 100}, extra_body={"ignore_eos": True}
    )
    hidden = {"ignore_eos": True, "skip_special_tokens": False}
    kept = complete(client, "pico", max_tokens=1, logit_bias={"2": 100}, extra_body=hidden)
    assert (shown, kept) == ("", "<|im_end|>")


def test_many_at_once_get_their_own_adapters(url: str, client: OpenAI) -> None:
    names = ["pico", "alice", "team/bob"] * 8
    prompts = [f"{PROMPT} {i % 5}" for i in range(len(names))]
    alone = [complete(client, n, prompt=p) for n, p in zip(names, prompts, strict=True)]

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as openai:
            answers = await asyncio.gather(
                *(
                    openai.completions.create(model=n, prompt=p, **GREEDY)
                    for n, p in zip(names, prompts, strict=True)
                )
            )
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(together()) == alone
    assert len(set(alone)) > 8


def test_a_put_is_what_the_next_request_sees(
    url: str, client: OpenAI, adapters: dict[str, Adapter]
) -> None:
    files = {name: serialize_adapter(adapter) for name, adapter in adapters.items()}
    bob = complete(client, "team/bob")
    first = httpx.put(f"{url}/v1/adapters/swap", content=files["a"]).json()
    assert first["previous"] is None
    alice = complete(client, "swap")
    for i in range(10):
        name = "b" if i % 2 == 0 else "a"
        body = httpx.put(f"{url}/v1/adapters/swap", content=files[name]).json()
        assert body["version"] == adapters[name].version
        assert complete(client, "swap") == (bob if name == "b" else alice)
    versions = httpx.get(f"{url}/v1/adapters/swap/versions").json()["data"]
    assert {v["version"] for v in versions} == {adapters["a"].version, adapters["b"].version}
    rolled = httpx.post(
        f"{url}/v1/adapters/swap/rollback", json={"version": adapters["b"].version}
    ).json()
    assert rolled == {"name": "swap", "version": adapters["b"].version}
    assert complete(client, "swap") == bob
    assert httpx.get(f"{url}/v1/adapters/swap").json()["version"] == adapters["b"].version
    assert httpx.delete(f"{url}/v1/adapters/swap").json() == {"name": "swap", "deleted": True}
    with pytest.raises(NotFoundError):
        complete(client, "swap")


def test_a_running_request_ends_on_the_version_it_started_with(
    url: str, client: OpenAI, adapters: dict[str, Adapter]
) -> None:
    """Streams that began before a swap are checked token for token, many times."""
    files = {name: serialize_adapter(adapters[name]) for name in ("a", "b")}
    more = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
    httpx.put(f"{url}/v1/adapters/run", content=files["a"])
    expected = {"a": complete(client, "run", **more)}
    httpx.put(f"{url}/v1/adapters/run", content=files["b"])
    expected["b"] = complete(client, "run", **more)
    assert expected["a"] != expected["b"]
    current = "b"
    for _ in range(6):
        stream = client.completions.create(
            model="run", prompt=PROMPT, stream=True, temperature=0, **more
        )
        text, swapped = "", False
        following = "a" if current == "b" else "b"
        for chunk in stream:
            text += chunk.choices[0].text
            if not swapped:
                httpx.put(f"{url}/v1/adapters/run", content=files[following]).raise_for_status()
                swapped = True
        assert text == expected[current]
        current = following
        assert complete(client, "run", **more) == expected[current]


def test_a_publication_in_the_store_is_seen_within_the_refresh(client: OpenAI, work: Path) -> None:
    lorasb("publish", work / "a.safetensors", work / "store", "late")
    alice, bob = complete(client, "alice"), complete(client, "team/bob")
    assert complete(client, "late") == alice
    lorasb("publish", work / "b.safetensors", work / "store", "late")
    deadline = time.monotonic() + 5
    while complete(client, "late") != bob:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    listed = lorasb("adapters", work / "store", "--json").stdout
    assert {a["name"] for a in json.loads(listed)["adapters"]} >= {"alice", "team/bob", "late"}


def test_a_client_that_leaves_frees_its_sequence(url: str) -> None:
    body = {"model": "pico", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    for stream in (True, False):
        more = {**body, "n": 64, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{url}/v1/completions", json=more) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=more, timeout=0.1)
        deadline = time.monotonic() + 10
        while gauge(url, "lorasb_sequences_running") or gauge(url, "lorasb_kv_tokens_used"):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def gauge(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise AssertionError(f"no metric {name}")


def test_tokenize_and_detokenize(url: str, pico: Path) -> None:
    tokenizer = load_tokenizer(pico)
    body = httpx.post(f"{url}/tokenize", json={"prompt": "Hi é"}).json()
    assert body["tokens"] == tokenizer.encode("Hi é") and body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 256
    text = httpx.post(f"{url}/detokenize", json={"tokens": body["tokens"]}).json()
    assert text == {"prompt": "Hi é"}
    chat = httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert tokenizer.decode(chat).endswith("<|im_start|>assistant\n")


CHAT = {"model": "pico", "messages": MESSAGES}
PLAIN = {"model": "pico", "prompt": "x"}
REFUSED: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("chat/completions", {**CHAT, "functions": []}, 400, "functions"),
    ("chat/completions", {**CHAT, "nonsense": 1}, 400, "nonsense"),
    ("chat/completions", {**CHAT, "temperature": "1"}, 400, "temperature"),
    ("chat/completions", {**CHAT, "temperature": 3}, 400, "temperature"),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, None),
    ("chat/completions", {"model": "pico"}, 400, "messages"),
    ("chat/completions", {"model": "pico", "messages": []}, 400, "messages"),
    ("chat/completions", {**CHAT, "max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
    ("chat/completions", {**CHAT, "max_tokens": 1000}, 400, "max_tokens"),
    ("chat/completions", {**CHAT, "adapter": {"inline": "x"}}, 400, "adapter.inline"),
    ("chat/completions", {**CHAT, "model": "nobody"}, 404, "model"),
    ("chat/completions", {**CHAT, "adapter": "nobody"}, 404, "adapter"),
    ("chat/completions", {**CHAT, "model": "../x"}, 404, "model"),
    ("chat/completions", {**CHAT, "model": "alice", "adapter": "alice"}, 400, "adapter"),
    ("completions", {**PLAIN, "suffix": "y"}, 400, "suffix"),
    ("completions", {**PLAIN, "best_of": 2}, 400, "best_of"),
    ("completions", {**PLAIN, "prompt": ""}, 400, "prompt"),
    ("completions", {**PLAIN, "prompt": []}, 400, None),
    ("completions", {**PLAIN, "prompt": [99999]}, 400, "prompt"),
    ("completions", {**PLAIN, "prompt": "x" * 300}, 400, "max_tokens"),
    ("completions", {**PLAIN, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("completions", {**PLAIN, "logit_bias": {"99999": 1}}, 400, None),
    ("completions", {**PLAIN, "stop_token_ids": [99999]}, 400, None),
    ("completions", {**PLAIN, "min_tokens": 20}, 400, "min_tokens"),
    ("completions", {**PLAIN, "n": 0}, 400, "n"),
    ("completions", {**PLAIN, "stop": [""]}, 400, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED)
def test_refusals_have_the_shape_of_openai(
    path: str, body: dict[str, Any], status: int, param: str | None, url: str
) -> None:
    for stream in (False, True):
        response = httpx.post(f"{url}/v1/{path}", json={**body, "stream": stream})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        if param is not None:
            assert error["param"] == param


def test_stream_options_need_a_stream(url: str) -> None:
    body = {**CHAT, "stream_options": {"include_usage": True}}
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


def test_refusals_reach_the_openai_client_as_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="context length is 256") as refusal:
        complete(client, "pico", prompt="x" * 300)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(NotFoundError) as missing:
        complete(client, "nobody")
    assert missing.value.code == "model_not_found"


def test_wrong_adapters_are_refused_and_nothing_is_lost(
    url: str, client: OpenAI, pico: Path, basis: Basis, adapters: dict[str, Adapter]
) -> None:
    before = complete(client, "alice")
    other = random_adapter(random_basis(pico, rank=4, seed=9), 1)
    good = serialize_adapter(adapters["a"])
    for content, status in (
        (serialize_adapter(other), 422),
        (good[:-1], 400),
        (b"", 400),
        (good + b"\0" * (4 * basis.size + (1 << 20)), 413),
    ):
        response = httpx.put(f"{url}/v1/adapters/alice", content=content)
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]
    for name, status in (("pico", 409), ("a/b/c", 400), ("versions", 400), ("x y", 400)):
        assert httpx.put(f"{url}/v1/adapters/{name}", content=good).status_code == status
    assert httpx.delete(f"{url}/v1/adapters/nobody").status_code == 404
    assert httpx.get(f"{url}/v1/adapters/nobody/versions").status_code == 404
    assert complete(client, "alice") == before


def test_other_routes(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "alive"}
    assert httpx.get(f"{url}/ready").status_code == 200
    assert httpx.get(f"{url}/nope").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{url}/v1/completions").status_code == 405
    bad = httpx.post(f"{url}/v1/completions", content=b"{", headers={"content-type": "text/json"})
    assert bad.status_code == 400 and bad.json()["error"]["message"]
    large = httpx.post(f"{url}/v1/completions", json={**PLAIN, "prompt": "x" * (17 << 20)})
    assert large.status_code == 413 and large.json()["error"]["message"]


def test_one_adapter_can_be_folded_in_at_start(
    pico: Path, work: Path, client: OpenAI, tmp_path: Path
) -> None:
    flags = ("--basis", work / "basis.safetensors", "--adapters", work / "store")
    with serving(tmp_path / "log", pico, *flags, "--dtype", "float32", "--merged", "alice") as url:
        merged = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [m.id for m in merged.models.list().data] == ["alice"]
        assert complete(merged, "alice", max_tokens=24) == complete(client, "alice", max_tokens=24)
        with pytest.raises(NotFoundError):
            complete(merged, "team/bob")
        merged.close()


def test_the_bare_model_is_served_without_a_basis(
    pico: Path, client: OpenAI, tmp_path: Path
) -> None:
    with serving(tmp_path / "log", pico, "--dtype", "float32") as url:
        bare = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [m.id for m in bare.models.list().data] == ["pico"]
        assert complete(bare, "pico") == complete(client, "pico")
        assert complete(bare, str(pico)) == complete(client, "pico")
        with pytest.raises(APIStatusError) as refusal:
            complete(bare, "alice")
        assert refusal.value.status_code == 404
        assert httpx.get(f"{url}/v1/adapters").status_code == 404
        bare.close()


def test_a_pinned_adapter_is_resident_from_the_start(
    pico: Path, work: Path, client: OpenAI, tmp_path: Path
) -> None:
    flags = ("--basis", work / "basis.safetensors", "--adapters", work / "store")
    pins = ("--pin", "alice", "--pin", "nobody", "--slots", 4)
    with serving(tmp_path / "log", pico, *flags, *pins, "--dtype", "float32") as url:
        metrics = httpx.get(f"{url}/metrics").text
        assert "\nlorasb_slots_used 1.0\n" in metrics and "\nlorasb_loader_cached 1.0\n" in metrics
        pinned = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert complete(pinned, "alice") == complete(client, "alice")
        assert "\nlorasb_slot_hits_total 1.0\n" in httpx.get(f"{url}/metrics").text
        pinned.close()
    assert "--pin nobody: not in the store yet" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "host: found '0.0.0.0', expected a loopback address"),
        (["--adapters", "x"], "--adapters and --pack need --basis"),
        (["--merged", "x"], "--merged needs --basis"),
        (["--pin", "x"], "--pin needs --basis"),
        (["--engine", "jax"], "engine: found 'jax'"),
        (["--dtype", "int4"], "dtype: found 'int4'"),
        (["--device", "gpu"], "device: found 'gpu'"),
        (["--device", "cuda:99"], "device: found 'cuda:99'"),
        (["--max-model-len", "9999"], "max-model-len: found 9999"),
        (["--basis", "gone"], "gone: no such file"),
        (["--port", "99999"], "--port"),
    ],
)
def test_serve_refuses_in_one_line(flags: list[str], message: str, pico: Path) -> None:
    command = [*LORASB, "serve", str(pico), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if "error:" in line]) == 1
    assert "Traceback" not in result.stderr

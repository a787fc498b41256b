"""Blends and inline adapters on the pico model: what they say is what the merged model says."""

import asyncio
import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bases import random_adapter, random_basis, reference_logits
from openai import AsyncOpenAI
from serving import lorasb, serving

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.config import EngineConfig
from lorasb_runtime.engines.base import GenerationRequest, SamplingParams
from lorasb_runtime.engines.torch.build import load_engine
from lorasb_runtime.models.load import load_causal_lm, load_tokenizer
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_server.blender import Blender

WEIGHTS = {"a": 0.7, "b": -0.4}
BLEND = [{"name": "alice", "weight": 0.7}, {"name": "team/bob", "weight": -0.4}]
PROMPT = "The sea"
COUNT = 16
TOKENS = [5, 90, 17, 200, 33, 41, 7, 64]


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico, rank=4, scaling=0.7)


@pytest.fixture(scope="module")
def adapters(basis: Basis) -> dict[str, Adapter]:
    return {name: random_adapter(basis, i, name=name) for i, name in enumerate("abc")}


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory, basis: Basis, adapters: dict[str, Adapter]
) -> Path:
    folder = tmp_path_factory.mktemp("blends")
    save_basis(basis, folder / "basis")
    for name, adapter in adapters.items():
        save_adapter(adapter, folder / name)
    lorasb("publish", folder / "a", folder / "store", "alice")
    lorasb("publish", folder / "b", folder / "store", "team/bob")
    return folder


@pytest.fixture(scope="module")
def url(pico: Path, work: Path) -> Iterator[str]:
    flags = ("--basis", work / "basis", "--adapters", work / "store", "--dtype", "float32")
    with serving(work / "serve.log", pico, *flags) as url:
        yield url


@pytest.fixture(scope="module")
def expected(pico: Path, work: Path) -> dict[str, str]:
    """What Hugging Face's generate says on each checkpoint that `lorasb merge` writes."""
    parts = {"blend": [f"{work / n}={w}" for n, w in WEIGHTS.items()], "a": [work / "a"]}
    parts |= {"c": [work / "c"]}
    said = {"base": generated(pico)}
    for name, words in parts.items():
        lorasb("merge", pico, "--basis", work / "basis", *words, "-o", work / f"merged-{name}")
        said[name] = generated(work / f"merged-{name}")
    assert len(set(said.values())) == 4
    return said


def generated(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    output = load_causal_lm(folder, torch.float32).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=COUNT,
        max_length=None,
    )
    text: str = tokenizer.decode(
        output[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


async def say(client: AsyncOpenAI, model: str, adapter: Any, stream: bool = False) -> str:
    body: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": COUNT}
    more: dict[str, Any] = {"temperature": 0, "extra_body": {"adapter": adapter}}
    if not stream:
        answer = await client.completions.create(**body, **more)
        assert answer.model == model
        return str(answer.choices[0].text)
    events = await client.completions.create(**body, **more, stream=True)
    return "".join([event.choices[0].text async for event in events])


def test_a_mixed_batch_says_what_the_merged_checkpoints_say(
    url: str, work: Path, expected: dict[str, str]
) -> None:
    inline = {"inline": base64.b64encode((work / "c").read_bytes()).decode()}
    asked: list[tuple[str, str, Any]] = [
        ("blend", "pico", BLEND),
        ("c", "pico", inline),
        ("a", "alice", None),
        ("base", "pico", None),
        ("blend", "pico", BLEND[::-1]),
        ("a", "pico", [{"name": "alice", "weight": 1.0}]),
        ("base", "pico", [{"name": "alice", "weight": 0}]),
    ]

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    say(client, model, adapter, stream)
                    for _, model, adapter in asked
                    for stream in (False, True)
                )
            )

    for _ in range(2):  # the second time from caches and resident slots
        answers = asyncio.run(all_at_once())
        assert answers == [expected[name] for name, _, _ in asked for _ in range(2)]


def test_a_chat_takes_them_too(url: str) -> None:
    body = {"model": "pico", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}

    def said(adapter: Any) -> str:
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={**body, "max_tokens": 8, "adapter": adapter}
        )
        text: str = answer.raise_for_status().json()["choices"][0]["message"]["content"]
        return text

    assert said(BLEND) == said(BLEND[::-1]) != said("alice")


def test_the_blend_made_offline_says_the_same(
    url: str, work: Path, expected: dict[str, str]
) -> None:
    words = [f"{work / n}={w}" for n, w in WEIGHTS.items()]
    lorasb("blend", *words, "-o", work / "mix.safetensors")
    data = (work / "mix.safetensors").read_bytes()
    httpx.put(f"{url}/v1/adapters/mix", content=data).raise_for_status()

    async def ask() -> str:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await say(client, "mix", None)

    assert asyncio.run(ask()) == expected["blend"]


def test_its_log_probabilities_are_those_of_the_sum_in_float64(
    pico: Path, basis: Basis, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    loader = AdapterLoader(AdapterStore(str(tmp_path)), basis)
    engine = load_engine(pico, basis, EngineConfig(dtype="float32", slots=3))
    assert engine.info.core_dtype == "float32"
    blender = Blender(loader.basis, torch.float32, MemoryCache(1 << 20, 4))
    parts = [
        (loader.publish(parse_name(name), serialize_adapter(adapters[name])), weight)
        for name, weight in WEIGHTS.items()
    ]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)

    async def found() -> torch.Tensor:
        request = GenerationRequest("x", tuple(TOKENS), params, blender.blend(parts))
        async for chunk in engine.generate(request):
            return torch.tensor([e.logprob for e in chunk.prompt_logprobs], dtype=torch.float64)
        raise AssertionError("no chunk")

    engine.start()
    try:
        logprobs = asyncio.run(found())
    finally:
        engine.close()
    total = sum(weight * adapters[name].cores.double() for name, weight in WEIGHTS.items())
    assert isinstance(total, torch.Tensor)
    summed = replace(adapters["a"], cores=total)
    reference = reference_logits(pico, basis, summed, TOKENS).log_softmax(-1)
    exact = reference[range(len(TOKENS) - 1), TOKENS[1:]]
    base = reference_logits(pico, basis, None, TOKENS).log_softmax(-1)
    assert (base[range(len(TOKENS) - 1), TOKENS[1:]] - exact).abs().max() > 0.1
    assert (logprobs - exact).abs().max() < 1e-4

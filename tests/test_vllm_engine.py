"""Our engine on vLLM: the right tokens for every row, swaps, eviction, and the whole protocol."""

import asyncio
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm")
from bases import random_adapter, reference_logits
from vllm_asking import (
    GREEDY,
    all_of,
    alone,
    check_greedy,
    collect,
    random_prompt,
    request,
    text_of,
    tokens_of,
)
from vllm_native import SLOTS, Native

from lorasb_runtime.engines.base import Chunk, Grammar, SamplingParams
from lorasb_runtime.errors import InputError
from lorasb_runtime.storage.adapter_file import Adapter


def test_all_32_adapters_and_the_base_in_one_batch(
    native: Native, vllm_adapters: list[Adapter]
) -> None:
    """Prompts are prefilled in chunks while others decode; the base's rows are among them."""
    rng = random.Random(3)
    owners: list[Adapter | None] = [*vllm_adapters[:32], None, None, None, None]
    rng.shuffle(owners)
    prompts = [random_prompt(rng) for _ in owners]
    asked = [request(p, o) for p, o in zip(prompts, owners, strict=True)]
    found = native.run(all_of(native, asked))
    for owner, prompt, chunks in zip(owners, prompts, found, strict=True):
        check_greedy(native, owner, prompt, tokens_of(chunks[0]))


def test_more_adapters_than_slots_take_turns(native: Native, vllm_adapters: list[Adapter]) -> None:
    rng = random.Random(4)
    owners = [vllm_adapters[i] for i in (32, 33, 34, 35, 36, 37, 38, 39, 0, 1)]
    prompts = [random_prompt(rng, 20) for _ in owners]
    asked = [request(p, o) for p, o in zip(prompts, owners, strict=True)]
    for owner, prompt, chunks in zip(
        owners, prompts, native.run(all_of(native, asked)), strict=True
    ):
        check_greedy(native, owner, prompt, tokens_of(chunks[0]))

    async def reported() -> None:
        while native.engine.stats().slot_evictions < 8:
            await asyncio.sleep(0.1)

    native.run(asyncio.wait_for(reported(), 30))
    stats = native.engine.stats()
    assert (stats.slots, stats.slots_used) == (SLOTS - 1, SLOTS - 1)
    assert stats.slot_fills >= 40 and stats.kv_tokens > 400
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)


def test_a_running_request_keeps_its_version_and_the_next_has_the_new_one(native: Native) -> None:
    old, new = (replace(random_adapter(native.basis, seed), name="alice") for seed in (101, 102))
    prompt = list(range(40, 60))
    long = replace(GREEDY, max_tokens=40)

    async def swap() -> tuple[list[Chunk], list[Chunk]]:
        running = native.engine.generate(request(prompt, old, long))
        first = [await anext(running)]
        second = (await collect(native, request(prompt, new)))[0]
        assert first[-1].finish_reason is None
        first += [chunk async for chunk in running]
        return first, second

    first, second = native.run(swap())
    check_greedy(native, old, prompt, tokens_of(first))
    check_greedy(native, new, prompt, tokens_of(second))
    assert tokens_of(first)[:12] != tokens_of(second)


def test_prompts_are_shared_under_one_version_and_one_tenant_alone(
    native: Native, vllm_adapters: list[Adapter]
) -> None:
    prompt = [3 + i % 250 for i in range(150)]
    alice = vllm_adapters[0]
    other = random_adapter(native.basis, 103, name=alice.name)

    def cached(adapter: Adapter | None, tenant: str = "") -> int:
        chunks = alone(native, prompt, adapter, tenant=tenant)
        check_greedy(native, adapter, prompt, tokens_of(chunks))
        return chunks[0].cached_tokens

    assert [cached(vllm_adapters[0]), cached(vllm_adapters[0])] == [0, 128]
    assert [cached(other), cached(None), cached(vllm_adapters[0], "acme")] == [0, 0, 0]
    assert [cached(vllm_adapters[0], "acme"), cached(None), cached(vllm_adapters[0])] == [
        128,
        128,
        128,
    ]


def test_logprobs_are_those_of_the_model(native: Native, vllm_adapters: list[Adapter]) -> None:
    params = replace(GREEDY, max_tokens=4, logprobs=3, prompt_logprobs=2)
    prompt = [9, 10, 11, 12]
    chunks = alone(native, prompt, vllm_adapters[1], params)
    tokens = tokens_of(chunks)
    whole = [*prompt, *tokens]
    rows = reference_logits(native.model, native.basis, vllm_adapters[1], whole).log_softmax(-1)
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [e.token for e in entries] == tokens
    noted = [*chunks[0].prompt_logprobs, *entries]
    assert [e.token for e in noted] == whole[1:]
    for position, entry in enumerate(noted):
        best = torch.topk(rows[position], 3 if position >= 3 else 2)
        assert entry.logprob == pytest.approx(rows[position, whole[position + 1]].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_stop_strings_end_and_never_leak(native: Native) -> None:
    whole = text_of(alone(native, [50, 51, 52]))
    stop = whole[3:5]
    chunks = alone(native, [50, 51, 52], None, replace(GREEDY, stop=(stop, "~~~")))
    assert text_of(chunks) == whole[: whole.index(stop)]
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)


def test_stop_tokens_and_min_tokens(native: Native) -> None:
    free = tokens_of(alone(native, [50, 51, 52]))
    token = free[4]
    chunks = alone(native, [50, 51, 52], None, replace(GREEDY, stop_token_ids=(token,)))
    assert tokens_of(chunks) == free[: free.index(token) + 1]
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", token)
    later = replace(GREEDY, stop_token_ids=(token,), min_tokens=8)
    assert len(tokens_of(alone(native, [50, 51, 52], None, later))) >= 8


def test_seeded_sampling_repeats_and_completions_differ(native: Native) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=10, seed=11, ignore_eos=True)
    twice = [native.run(collect(native, request([5, 6, 7], None, params, n=3))) for _ in range(2)]
    first, second = ({i: tokens_of(c) for i, c in chunks.items()} for chunks in twice)
    assert first == second and sorted(first) == [0, 1, 2]
    assert len({tuple(tokens) for tokens in first.values()}) == 3


def test_bias_and_penalties_reach_the_sampler(native: Native) -> None:
    biased = alone(native, [5, 6], None, replace(GREEDY, logit_bias={77: 100.0}))
    assert set(tokens_of(biased)) == {77}
    penalized = replace(GREEDY, logit_bias={77: 30.0, 78: 30.0}, frequency_penalty=2.0)
    assert {77, 78} <= set(tokens_of(alone(native, [5, 6], None, penalized)))


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (Grammar("choice", '["yes", "no"]'), lambda text: text in ("yes", "no")),
        (Grammar("regex", "[0-9]{3}"), lambda text: len(text) == 3 and text.isdigit()),
        (Grammar("lark", 'start: "ab" "c"'), lambda text: text == "abc"),
        (
            Grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "boolean"}},'
                    ' "required": ["a"], "additionalProperties": false}'),
            lambda text: isinstance(json.loads(text)["a"], bool),
        ),
    ],
)  # fmt: skip
def test_grammars_hold(native: Native, grammar: Grammar, fits: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, grammar=grammar, ignore_eos=True)
    chunks = alone(native, [20, 21, 22], None, params)
    assert chunks[-1].finish_reason == "stop"
    assert fits(text_of(chunks)), text_of(chunks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.005}, "temperature: found 0.005, expected 0 or at least 0.01"),
        ({"grammar": Grammar("regex", "(")}, "rammar|egex"),
        ({"grammar": Grammar("lark", "start: nothing")}, "rammar"),
        ({"stop_token_ids": (100000,)}, "token id: found 100000"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    native: Native, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        alone(native, [5, 6], None, replace(GREEDY, **change))


def test_a_prompt_over_the_context_is_refused(native: Native) -> None:
    with pytest.raises(InputError, match="prompt: found 400 tokens, expected fewer than"):
        alone(native, [5] * 400)


def test_leaving_early_ends_the_request(native: Native, vllm_adapters: list[Adapter]) -> None:
    async def leave() -> None:
        stream = native.engine.generate(
            request([5, 6], vllm_adapters[2], replace(GREEDY, max_tokens=390))
        )
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        while native.engine.stats().running:
            await collect(native, request([7]))

    native.run(asyncio.wait_for(leave(), 30))

"""Asks the engine in its loop's thread, and knows what it should say."""

import asyncio
import random
from collections.abc import Sequence
from itertools import count
from typing import Any

from bases import reference_logits
from vllm_native import Native, loaded

from lorasb_runtime.engines.base import Chunk, GenerationRequest, SamplingParams
from lorasb_runtime.storage.adapter_file import Adapter

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
NUMBERS = count()


def request(
    prompt: Sequence[int], adapter: Adapter | None = None, sampling: SamplingParams = GREEDY,
    **more: Any,
) -> GenerationRequest:  # fmt: skip
    lora = None if adapter is None else loaded(adapter)
    return GenerationRequest(f"r{next(NUMBERS)}", tuple(prompt), sampling, lora, **more)


async def collect(native: Native, asked: GenerationRequest) -> dict[int, list[Chunk]]:
    chunks: dict[int, list[Chunk]] = {}
    async for chunk in native.engine.generate(asked):
        chunks.setdefault(chunk.index, []).append(chunk)
    for parts in chunks.values():
        assert [c.finish_reason is not None for c in parts] == [False] * (len(parts) - 1) + [True]
    return chunks


async def all_of(
    native: Native, asked: Sequence[GenerationRequest]
) -> list[dict[int, list[Chunk]]]:
    return await asyncio.gather(*(collect(native, one) for one in asked))


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def alone(native: Native, *args: Any, **more: Any) -> list[Chunk]:
    return native.run(collect(native, request(*args, **more)))[0]


def check_greedy(
    native: Native, owner: Adapter | None, prompt: Sequence[int], tokens: list[int]
) -> None:
    """Every token is the likeliest one after those before it, by the merged weights."""
    whole = [*prompt, *tokens]
    logits = reference_logits(native.model, native.basis, owner, whole)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def random_prompt(rng: random.Random, longest: int = 60) -> list[int]:
    return [rng.randrange(3, 250) for _ in range(rng.randint(1, longest))]

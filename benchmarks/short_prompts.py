"""What a wave of short prompts takes, each under an adapter of its own, by two ways in turn.

As the engine does it, by kernels that take all of a step's short prompts in one call; and with a
call for each prompt, as longer ones have it. Both in one process, on one engine.

    python benchmarks/short_prompts.py models/SmolLM2-135M-Instruct
"""

import argparse
import asyncio
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from lorasb_runtime.engines.base import GenerationRequest, SamplingParams
from lorasb_runtime.engines.torch import core_rows, kv_batch
from lorasb_runtime.engines.torch.bench import machine, random_adapter, random_basis
from lorasb_runtime.engines.torch.build import build_engine
from lorasb_runtime.engines.torch.engine import TorchEngine
from lorasb_runtime.engines.torch.prepare import load_model
from lorasb_runtime.models.load import load_tokenizer, parse_dtype
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.ops.threads import use_all_cores

# SHORT_RUN and MOST_KERNEL_PAIRS: up to what a prompt is the kernels'.
TOGETHER = core_rows.SHORT_RUN, kv_batch.MOST_KERNEL_PAIRS
ONE_BY_ONE = 0, 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Short prompts together against one by one.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=16, help="at once")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as `lorasb serve` does, outside the engine's own thread
    with ThreadPoolExecutor(1, initializer=use_all_cores) as pool:
        engine, adapters = pool.submit(load, options).result()
    engine.start()
    try:
        wave(engine, adapters, 2)
        results = [compare(engine, adapters, n, options.rounds) for n in options.lengths]
    finally:
        engine.close()
    if options.json:
        print(json.dumps({"lengths": results, **machine()}))
    else:
        for result in results:
            print(line(result))


def load(options: argparse.Namespace) -> tuple[TorchEngine, list[LoadedAdapter]]:
    model = load_model(options.model, parse_dtype(options.dtype), torch.device("cpu"))
    basis = random_basis(model, options.rank)
    config = EngineConfig(
        slots=options.prompts + 1,
        cache=CacheConfig(prefix_nbytes=0),
        scheduler=SchedulerConfig(max_num_seqs=options.prompts),
    )
    codec = TextCodec(load_tokenizer(options.model))
    adapters = [random_adapter(basis, i) for i in range(options.prompts)]
    return build_engine(model, codec, basis, config), adapters


def compare(
    engine: TorchEngine, adapters: list[LoadedAdapter], length: int, rounds: int
) -> dict[str, float]:
    """Medians of the seconds that both ways took, and of their ratio, round by round."""
    together, alone = [], []
    for _ in range(rounds):
        for way, took in ((ONE_BY_ONE, alone), (TOGETHER, together)):
            core_rows.SHORT_RUN, kv_batch.MOST_KERNEL_PAIRS = way
            took.append(wave(engine, adapters, length))
    ratios = [a / b for a, b in zip(together, alone, strict=True)]
    return {
        "length": length,
        "one_by_one": statistics.median(alone),
        "together": statistics.median(together),
        "ratio": statistics.median(ratios),
    }


def wave(engine: TorchEngine, adapters: list[LoadedAdapter], length: int) -> float:
    """Seconds until each adapter has answered a prompt of so many tokens with one."""

    async def one(number: int, adapter: LoadedAdapter) -> None:
        prompt = tuple(100 + (7 * number + 13 * i) % 1000 for i in range(length))
        params = SamplingParams(temperature=0.0, max_tokens=1)
        async for _ in engine.generate(GenerationRequest(str(number), prompt, params, adapter)):
            pass

    async def all_of_them() -> None:
        await asyncio.gather(*(one(i, adapter) for i, adapter in enumerate(adapters)))

    began = time.perf_counter()
    asyncio.run(all_of_them())
    return time.perf_counter() - began


def line(result: dict[str, float]) -> str:
    one, both = 1000 * result["one_by_one"], 1000 * result["together"]
    return (
        f"{result['length']:>4.0f} tokens: one by one {one:.0f} ms, together {both:.0f} ms, "
        f"{result['ratio']:.2f} of it"
    )


if __name__ == "__main__":
    main()

"""Tokens per second with many adapters over the same engine without any, side by side.

    python benchmarks/multi_adapter.py --model models/SmolLM2-135M-Instruct --dtype float32

Each case runs in a process of its own, all cases in turn, several rounds; medians are printed. The
base is the engine with no basis loaded at all. Adapters are random, their basis too: the arithmetic
does not depend on the values.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lorasb_runtime.adapters.loader import LoadedAdapter
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.config import EngineConfig, SchedulerConfig
from lorasb_runtime.engines.base import GenerationRequest, SamplingParams
from lorasb_runtime.engines.torch.build import build_engine
from lorasb_runtime.engines.torch.engine import TorchEngine
from lorasb_runtime.engines.torch.runner import load_model
from lorasb_runtime.models.load import load_tokenizer, parse_dtype
from lorasb_runtime.models.targets import find_targets
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.storage.basis_file import Basis

# Case: rank of the basis (0: none) and number of different adapters.
CASES = {"base": (0, 0), "r16 x 32": (16, 32), "r64 x 32": (64, 32), "r16 x 1000": (16, 1000)}
CORE_SCALE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description="multi-adapter throughput")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=32, help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens of each")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help="run this case alone, here")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options)))
        return
    rates: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rates[case].append(json.loads(output.splitlines()[-1])["tokens_per_second"])
    report(options, rates)


def report(options: argparse.Namespace, rates: dict[str, list[float]]) -> None:
    """Medians, and the median of each round's ratio to that round's base."""
    if not options.json:
        print(
            f"{options.dtype}, batch {options.batch}, prompt {options.prompt}, decoding "
            f"{options.tokens}, {options.rounds} rounds, torch {torch.__version__}, "
            f"{os.cpu_count()} x {platform.machine()}"
        )
    for case, found in rates.items():
        ratio = statistics.median(
            rate / base for rate, base in zip(found, rates["base"], strict=True)
        )
        row = {"case": case, "tokens_per_second": statistics.median(found), "ratio": ratio}
        if options.json:
            print(json.dumps(row))
        else:
            print(f"{case:<12} {row['tokens_per_second']:>8.1f} tok/s   {ratio:.3f} of base")


def run_case(options: argparse.Namespace) -> dict[str, float]:
    rank, count = CASES[options.case]
    model = load_model(options.model, parse_dtype(options.dtype), torch.device("cpu"))
    basis = None
    if rank:
        targets = find_targets(model, rank)
        tensors = {}
        for t in targets:
            tensors[f"{t.module}.A"] = torch.randn(t.rank, t.in_features) / t.in_features**0.5
            tensors[f"{t.module}.B"] = torch.randn(t.out_features, t.rank) / t.out_features**0.5
        basis = Basis(targets, tensors, "lora-sb")
    config = EngineConfig(
        slots=count + 1 if count else 2,
        scheduler=SchedulerConfig(max_num_seqs=options.batch, max_batched_tokens=512),
    )
    codec = TextCodec(load_tokenizer(options.model))
    engine = build_engine(model, codec, basis, config)
    adapters: list[LoadedAdapter | None] = [None]
    if basis is not None:
        names = [f"u{i}" for i in range(count)]
        adapters = [
            LoadedAdapter(parse_name(n), n, CORE_SCALE * torch.randn(basis.size)) for n in names
        ]
    engine.start()
    try:
        return {"tokens_per_second": asyncio.run(measure(engine, adapters, options))}
    finally:
        engine.close()


async def measure(
    engine: TorchEngine, adapters: list[LoadedAdapter | None], options: argparse.Namespace
) -> float:
    """Decoded tokens per second from the moment that all requests of a wave are decoding.

    One wave to warm up; then as many as it takes to use 128 adapters at least once.
    """
    rates = []
    waves = max(2, min(len(adapters), 128) // options.batch + 1)
    for wave in range(waves):
        stamps = await asyncio.gather(
            *(
                one(engine, i, adapters[(wave * options.batch + i) % len(adapters)], options)
                for i in range(options.batch)
            )
        )
        began = max(stamp[0] for stamp in stamps)
        ended = max(stamp[-1] for stamp in stamps)
        tokens = sum(t > began for stamp in stamps for t in stamp)
        rates.append(tokens / (ended - began))
    return statistics.median(rates[1:])


async def one(
    engine: TorchEngine, index: int, adapter: LoadedAdapter | None, options: argparse.Namespace
) -> list[float]:
    """When each token of one request came."""
    prompt = tuple(100 + (7 * index + 13 * i) % 1000 for i in range(options.prompt))
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True)
    stamps = []
    async for _ in engine.generate(GenerationRequest(str(index), prompt, params, adapter)):
        stamps.append(time.perf_counter())
    return stamps


if __name__ == "__main__":
    main()

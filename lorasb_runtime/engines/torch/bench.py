"""Measures the engine: tokens per second with many adapters, with none, and Hugging Face's own.

Adapters are random, and so is the basis unless one is given: the arithmetic does not depend on the
values.
"""

import asyncio
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.config import EngineConfig, SchedulerConfig
from lorasb_runtime.engines.base import GenerationRequest, SamplingParams
from lorasb_runtime.engines.torch.build import build_engine
from lorasb_runtime.engines.torch.engine import TorchEngine
from lorasb_runtime.engines.torch.prepare import load_model
from lorasb_runtime.models.load import load_tokenizer, parse_dtype
from lorasb_runtime.models.targets import find_targets
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.ops.threads import use_all_cores
from lorasb_runtime.storage.basis_file import Basis, load_basis

CORE_SCALE = 0.01
BASE = "no basis"


@dataclass(frozen=True)
class BenchCase:
    """`batch` requests at once, decoding `tokens` tokens each after a prompt of `prompt` tokens.

    adapters: how many different ones take turns (0: none, and no basis is loaded). rank: of the
    random basis, where `basis` names no file. resident: fill the slot table with this many
    adapters first. kind "generate" is Hugging Face's `generate` with a static batch instead.
    """

    folder: Path
    dtype: str | None
    kind: str = "engine"
    batch: int = 32
    prompt: int = 64
    tokens: int = 64
    adapters: int = 0
    rank: int = 16
    basis: Path | None = None
    resident: int = 0


@contextmanager
def ready(case: BenchCase) -> Iterator[Callable[[], dict[str, float]]]:
    """The case loaded in this process; what it gives computes one wave of requests.

    tokens_per_second while all of them decode. For the engine also outside_forward, the share of
    its steps that is not the model's forward pass; with `resident` also memory_ratio, the memory
    that the resident adapters take over that of their cores.
    """
    with (_generate if case.kind == "generate" else _engine)(case) as measure:
        yield measure


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


@contextmanager
def _engine(case: BenchCase) -> Iterator[Callable[[], dict[str, float]]]:
    torch.set_num_threads(1)  # as `lorasb serve` does, outside the engine's own thread
    with ThreadPoolExecutor(1, initializer=use_all_cores) as pool:
        engine, adapters, memory = pool.submit(_loaded, case).result()
    wave = 0

    def measure() -> dict[str, float]:
        nonlocal wave
        before = engine.stats()
        rate = asyncio.run(_wave(engine, adapters, case, wave))
        wave += 1
        after = engine.stats()
        inside = after.forward_seconds - before.forward_seconds
        outside = 1 - inside / (after.step_seconds - before.step_seconds)
        return {"tokens_per_second": rate, "outside_forward": outside, **memory}

    engine.start()
    try:
        yield measure
    finally:
        engine.close()


def _loaded(
    case: BenchCase,
) -> tuple[TorchEngine, list[LoadedAdapter | None], dict[str, float]]:
    """The engine, its adapters, and what there is to say of their memory."""
    dtype = parse_dtype(case.dtype) if case.dtype else None
    model = load_model(case.folder, dtype, torch.device("cpu"))
    basis = None
    if case.adapters:
        basis = load_basis(case.basis) if case.basis else random_basis(model, case.rank)
    config = EngineConfig(
        slots=max(2, case.adapters + 1, case.resident + 1),
        scheduler=SchedulerConfig(max_num_seqs=case.batch),
    )
    engine = build_engine(model, TextCodec(load_tokenizer(case.folder)), basis, config)
    if basis is None:
        return engine, [None], {}
    before = _resident_bytes()
    adapters: list[LoadedAdapter | None] = [random_adapter(basis, i) for i in range(case.adapters)]
    for i in range(case.resident):
        engine.warm(random_adapter(basis, i % 64, f"resident-{i}"))
    if not case.resident:
        return engine, adapters, {}
    one = basis.size * engine.core_bytes
    table = one * config.slots  # written whole when it was made, so that it is in `before`
    taken = table + _resident_bytes() - before
    return engine, adapters, {"memory_ratio": taken / (one * case.resident)}


async def _wave(
    engine: TorchEngine, adapters: list[LoadedAdapter | None], case: BenchCase, wave: int
) -> float:
    """Tokens per second while all of a wave's requests decode."""
    numbers = range(wave * case.batch, (wave + 1) * case.batch)
    stamps = await asyncio.gather(
        *(_one(engine, number, adapters[number % len(adapters)], case) for number in numbers)
    )
    began = max(stamp[0] for stamp in stamps)
    ended = min(stamp[-1] for stamp in stamps)
    return sum(began < t <= ended for stamp in stamps for t in stamp) / (ended - began)


async def _one(
    engine: TorchEngine, number: int, adapter: LoadedAdapter | None, case: BenchCase
) -> list[float]:
    """When each token of one request came; prompts differ from their first token on."""
    prompt = tuple(100 + (7 * number + 13 * i) % 1000 for i in range(case.prompt))
    params = SamplingParams(temperature=0.0, max_tokens=case.tokens, ignore_eos=True)
    stamps = []
    async for _ in engine.generate(GenerationRequest(str(number), prompt, params, adapter)):
        stamps.append(time.perf_counter())
    return stamps


@contextmanager
def _generate(case: BenchCase) -> Iterator[Callable[[], dict[str, float]]]:
    """Hugging Face's `generate`, greedy, all prompts of one length, from the first new token on."""
    dtype = parse_dtype(case.dtype) if case.dtype else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=dtype, local_files_only=True
    ).eval()
    prompts = [
        [100 + (7 * n + 13 * i) % 1000 for i in range(case.prompt)] for n in range(case.batch)
    ]
    ids = torch.tensor(prompts)

    def measure() -> dict[str, float]:
        stamps = _Stamps()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=case.tokens,
            max_new_tokens=case.tokens,
            pad_token_id=0,
            logits_processor=[stamps],
        )
        taken = stamps.times[-1] - stamps.times[0]
        return {"tokens_per_second": case.batch * (len(stamps.times) - 1) / taken}

    yield measure


class _Stamps(LogitsProcessor):
    """Notes when each step's logits are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def random_basis(model: Any, rank: int) -> Basis:
    """B and A of normal noise, about of unit length, for every target of the model."""
    targets = find_targets(model, rank)
    tensors = {}
    for t in targets:
        tensors[f"{t.module}.A"] = torch.randn(t.rank, t.in_features) / t.in_features**0.5
        tensors[f"{t.module}.B"] = torch.randn(t.out_features, t.rank) / t.out_features**0.5
    return Basis(targets, tensors, "lora-sb")


def random_adapter(basis: Basis, seed: int, version: str | None = None) -> LoadedAdapter:
    generator = torch.Generator().manual_seed(seed)
    cores = CORE_SCALE * torch.randn(basis.size, generator=generator)
    name = version or f"u{seed}"
    return LoadedAdapter(parse_name(name), name, cores)


def _resident_bytes() -> int:
    """Memory of this process that is resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def bench_cases(
    base: BenchCase, adapters: int, *, generate: bool, resident: int
) -> dict[str, dict[str, BenchCase]]:
    """What is measured, by name, below what it is compared with: BASE, or one of BASE's own.

    Each reference is the first of its cases.
    """
    ranks = (16, 64) if base.basis is None else (None,)
    none = {BASE: replace(base, basis=None)}
    for rank in ranks:
        name = f"{adapters} adapters" if rank is None else f"{adapters} adapters, rank {rank}"
        none[name] = replace(base, adapters=adapters, rank=rank or base.rank)
    few = list(none)[1]
    many = {few: none[few], "1000 adapters in turn": replace(none[few], adapters=1000)}
    if resident:
        many[f"{few}, {resident} resident"] = replace(none[few], resident=resident)
    if generate:
        none["Hugging Face generate"] = replace(base, kind="generate", basis=None)
    return {BASE: none, few: many}

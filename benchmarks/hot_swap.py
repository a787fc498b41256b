"""What a swap costs: filling a slot, PUT to first token, and a full batch's throughput.

The last twice: swaps that others make in the store, each seen and fetched by the server, under
short answers; and swaps by PUT, which share the model's cores with the server's HTTP.

    python benchmarks/hot_swap.py models/SmolLM2-135M-Instruct

The basis and the adapters are random, in a temporary folder; every swap is a version that the
server has never seen. Each version's greedy answers are taken beforehand, on it alone; every
answer under load is compared with that of the version that was current when it began. The prefix
cache is off, so that a window without swaps has no less to compute than one with them.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from server_process import serving
from swap_files import Versions, make_basis, make_variant
from swap_load import PROMPTS, Load, Owner, PutClient, Window, ask, publish_elsewhere

from lorasb_runtime.adapters.slots import SlotTable
from lorasb_runtime.engines.torch.bench import machine

FIRST_TOKENS = 4  # of each answer in the measurement from PUT to first token


def main() -> None:
    parser = argparse.ArgumentParser(description="hot swaps")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--strength", type=float, default=0.5, help="of the random cores")
    parser.add_argument("--variants", type=int, default=4, help="adapters that differ")
    parser.add_argument("--batch", type=int, default=32, help="streams at once")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer under PUTs")
    parser.add_argument("--short", type=int, default=5, help="tokens where the store is swapped")
    parser.add_argument("--swaps", type=float, default=2000, help="a minute")
    parser.add_argument("--seconds", type=float, default=20, help="of each window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=200, help="of single swaps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    result |= {"rank": options.rank, "batch": options.batch, "dtype": options.dtype, **machine()}
    print(json.dumps(result) if options.json else table(result))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    basis = make_basis(options.model, options.rank, folder / "basis")
    cores = [make_variant(basis, i, options.strength) for i in range(options.variants)]
    versions = [Versions(basis, core) for core in cores]
    serials = itertools.count()

    def make(variant: int) -> bytes:
        return versions[variant].file(next(serials))

    result: dict[str, Any] = {"slot_fill": slot_fill(cores, options.dtype)}
    flags = ["--basis", folder / "basis", "--adapters", folder / "store"]
    flags += ["--dtype", options.dtype, "--prefix-cache-gib", 0]
    flags += ["--max-num-seqs", options.batch, "--refresh", 0]
    with serving(folder / "log", options.model, *flags) as url:
        result |= asyncio.run(against_server(url, options, make, folder / "store"))
    return result


def slot_fill(cores: list[torch.Tensor], dtype: str, times: int = 2000) -> dict[str, float]:
    """Seconds from host memory to a ready slot, of versions that are not resident."""
    table = SlotTable(1024, cores[0].numel(), getattr(torch, dtype), torch.device("cpu"))
    took = []
    for i in range(times):
        began = time.perf_counter()
        slot = table.lease(f"v{i}", cores[i % len(cores)])
        took.append(time.perf_counter() - began)
        assert slot is not None
        table.release(slot)
    return spread(took)


async def against_server(
    url: str, options: argparse.Namespace, make: Callable[[int], bytes], store: Path
) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        known = await known_answers(client, options, make)
        owners = [Owner(f"u{i}", PROMPTS[i % len(PROMPTS)]) for i in range(options.batch)]
        puts = Load(client, owners, options.tokens, make, PutClient(client.base_url).put, known)
        elsewhere = Load(
            client, owners, options.short, make, partial(publish_elsewhere, store), known
        )
        for owner in owners:
            await puts.swap(owner)
        single = await put_to_first_token(client, puts, owners[0], options.repeats)
        by = {}
        # Not every swap in the store is seen: a user may ask again only after the next one.
        for name, load, asked in (("store", elsewhere, 1.5), ("put", puts, 1.0)):
            await load.run(2, 0)  # to warm up
            rounds = []
            for _ in range(options.rounds):
                still = await load.run(options.seconds, 0)
                rounds.append((still, await load.run(options.seconds, asked * options.swaps)))
            by[name] = under_load(rounds)
    return {**single, "by": by}


async def known_answers(
    client: httpx.AsyncClient, options: argparse.Namespace, make: Callable[[int], bytes]
) -> dict[tuple[str, int], tuple[str, ...]]:
    """Each variant's answer to each prompt; they must tell all variants apart."""
    known: dict[tuple[str, int], tuple[str, ...]] = {}
    for variant in range(options.variants):
        await client.put("/v1/adapters/known", content=make(variant))
        answers = await asyncio.gather(
            *(ask(client, "known", prompt, options.tokens) for prompt in PROMPTS)
        )
        known |= {(p, variant): a.pieces for p, a in zip(PROMPTS, answers, strict=True)}
    if len({(p, answer[: options.short]) for (p, _), answer in known.items()}) != len(known):
        raise SystemExit("two variants give the same answer: raise --strength or --short")
    return known


async def put_to_first_token(
    client: httpx.AsyncClient, load: Load, owner: Owner, repeats: int
) -> dict[str, Any]:
    """Seconds on an idle server: with a swap before the request, and without one, in turn."""
    swapped, puts, resident = [], [], []
    for _ in range(repeats):
        began = time.monotonic()
        puts.append(await load.swap(owner))
        swapped.append((await ask(client, owner.name, owner.prompt, FIRST_TOKENS)).first - began)
        again = await ask(client, owner.name, owner.prompt, FIRST_TOKENS)
        resident.append(again.first - again.sent)
    return {
        "put": spread(puts),
        "put_to_first_token": spread(swapped),
        "first_token_of_a_resident_version": spread(resident),
        "swap_alone": spread([a - b for a, b in zip(swapped, resident, strict=True)]),
    }


def under_load(rounds: list[tuple[Window, Window]]) -> dict[str, Any]:
    ratios = [with_.tokens_per_second / still.tokens_per_second for still, with_ in rounds]
    swaps = [seconds for _, with_ in rounds for seconds in with_.swap_seconds]
    windows = [window for pair in rounds for window in pair]
    return {
        "tokens_per_second_without_swaps": [still.tokens_per_second for still, _ in rounds],
        "tokens_per_second_with_swaps": [with_.tokens_per_second for _, with_ in rounds],
        "throughput_lost": 1 - statistics.median(ratios),
        "throughput_lost_by_round": [1 - ratio for ratio in ratios],
        "swaps_per_minute": statistics.median(with_.swaps_per_minute for _, with_ in rounds),
        "swap": spread(swaps),
        "answers": sum(window.answers for window in windows),
        "wrong_answers": sum(window.wrong_answers for window in windows),
        "wrong_tokens": sum(window.wrong_tokens for window in windows),
        "wrong_tokens_without_swaps": sum(still.wrong_tokens for still, _ in rounds),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"median": statistics.median(ordered), "p99": ordered[int(0.99 * len(ordered))]}


def table(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            line("host memory to ready slot", result["slot_fill"]),
            line("PUT, idle server", result["put"]),
            line("PUT to first token, idle server", result["put_to_first_token"]),
            line("first token of a resident version", result["first_token_of_a_resident_version"]),
            line("the swap's own part", result["swap_alone"]),
            *(text for name, by in result["by"].items() for text in load_lines(name, by)),
        ]
    )


def line(text: str, seconds: dict[str, float]) -> str:
    median, p99 = (1000 * seconds[name] for name in ("median", "p99"))
    return f"{text:<52} median {median:>9.3f} ms   p99 {p99:>9.3f} ms"


def load_lines(name: str, by: dict[str, Any]) -> list[str]:
    without, with_ = (
        statistics.median(by[f"tokens_per_second_{which}_swaps"]) for which in ("without", "with")
    )
    by_round = ", ".join(f"{lost:.1%}" for lost in by["throughput_lost_by_round"])
    return [
        line(f"a swap by {name} under load", by["swap"]),
        f"swaps by {name}: {without:.1f} tok/s without them, {with_:.1f} with "
        f"{by['swaps_per_minute']:.0f} a minute: {by['throughput_lost']:.1%} lost "
        f"(by round: {by_round})",
        f"{by['answers']} answers checked: {by['wrong_answers']} wrong, with "
        f"{by['wrong_tokens']} wrong tokens ({by['wrong_tokens_without_swaps']} of them "
        "without swaps)",
    ]


if __name__ == "__main__":
    main()

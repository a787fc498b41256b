"""What a swap costs: filling a slot, PUT to first token, and a full batch's throughput.

The last twice: swaps that others make in the store, each seen and fetched by the server, under
short answers, as a request has to come for each; and swaps by PUT, which share the model's cores
with the server's HTTP and its writing.

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
import math
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
from swap_client import Client
from swap_files import Versions, make_basis, make_variant
from swap_load import PROMPTS, Load, Owner, Run, Window, publish_elsewhere

from lorasb_runtime.adapters.slots import SlotTable
from lorasb_runtime.engines.torch.bench import machine

FIRST_TOKENS = 4  # of each answer in the measurement from PUT to first token


def main() -> None:
    parser = argparse.ArgumentParser(description="hot swaps")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--strength", type=float, default=1.0, help="of the random cores")
    parser.add_argument("--variants", type=int, default=4, help="adapters that differ")
    parser.add_argument("--batch", type=int, default=32, help="streams at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer under PUTs")
    parser.add_argument("--short", type=int, default=2, help="tokens where the store is swapped")
    parser.add_argument("--swaps", type=float, default=2000, help="a minute")
    parser.add_argument("--seconds", type=float, default=3, help="of each window")
    parser.add_argument("--rounds", type=int, default=20, help="windows without swaps and with")
    kinds = ("store", "put")
    parser.add_argument("--by", choices=kinds, nargs="+", default=kinds, help="swaps under load")
    parser.add_argument("--repeats", type=int, default=50, help="of single swaps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds: found {options.rounds}, expected 2 or more, as they are compared")
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
    client = Client(httpx.URL(url))
    long, short = [
        await known_answers(client, options.variants, make, tokens)
        for tokens in (options.tokens, options.short)
    ]
    owners = [Owner(f"u{i}", PROMPTS[i % len(PROMPTS)]) for i in range(options.batch)]
    puts = Load(client, owners, options.tokens, make, client.put, long)
    elsewhere = Load(
        client,
        owners,
        options.short,
        make,
        partial(publish_elsewhere, store),
        short,
        elsewhere=True,
    )
    for owner in owners:
        await puts.swap(owner)
    single = await put_to_first_token(client, puts, owners[0], options.repeats)
    loads, by = {"store": elsewhere, "put": puts}, {}
    for name in options.by:
        run = await loads[name].run(options.rounds, options.seconds, options.swaps)
        by[name] = under_load(run)
    return {**single, "by": by}


async def known_answers(
    client: Client, variants: int, make: Callable[[int], bytes], tokens: int
) -> dict[tuple[str, int], tuple[str, ...]]:
    """Each variant's answer to each prompt; they must tell all variants apart."""
    known: dict[tuple[str, int], tuple[str, ...]] = {}
    for variant in range(variants):
        await client.put("known", make(variant))
        answers = await asyncio.gather(*(client.ask("known", prompt, tokens) for prompt in PROMPTS))
        known |= {(p, variant): a.pieces for p, a in zip(PROMPTS, answers, strict=True)}
    if len({(p, answer) for (p, _), answer in known.items()}) != len(known):
        raise SystemExit("two variants give the same answer: raise --strength or --short")
    return known


async def put_to_first_token(
    client: Client, load: Load, owner: Owner, repeats: int
) -> dict[str, Any]:
    """Seconds on an idle server: with a swap before the request, and without one, in turn."""
    swapped, puts, resident = [], [], []
    for _ in range(repeats):
        began = time.monotonic()
        puts.append(await load.swap(owner))
        swapped.append((await client.ask(owner.name, owner.prompt, FIRST_TOKENS)).first - began)
        again = await client.ask(owner.name, owner.prompt, FIRST_TOKENS)
        resident.append(again.first - again.sent)
    return {
        "put": spread(puts),
        "put_to_first_token": spread(swapped),
        "first_token_of_a_resident_version": spread(resident),
        "swap_alone": spread([a - b for a, b in zip(swapped, resident, strict=True)]),
    }


def under_load(run: Run) -> dict[str, Any]:
    still, swapped = rate(run.still), rate(run.swapped)
    pairs = zip(run.still, run.swapped, strict=True)
    by_round = [1 - rate([b]) / rate([a]) for a, b in pairs]
    return {
        "tokens_per_second_without_swaps": still,
        "tokens_per_second_with_swaps": swapped,
        "throughput_lost": 1 - swapped / still,
        "throughput_lost_margin": margin(by_round),
        "throughput_lost_by_round": by_round,
        "swaps_per_minute": 60 * sum(w.swaps for w in run.swapped) / seconds(run.swapped),
        "swap": spread([took for window in run.swapped for took in window.swap_seconds]),
        "answers": run.answers,
        "wrong_answers": run.wrong_answers,
        "wrong_tokens": run.wrong_tokens,
    }


def margin(values: list[float]) -> float:
    """Two standard errors of the mean of two values or more."""
    return 2 * statistics.stdev(values) / math.sqrt(len(values))


def rate(windows: list[Window]) -> float:
    """Tokens per second, over all the windows."""
    return sum(window.tokens for window in windows) / seconds(windows)


def seconds(windows: list[Window]) -> float:
    return sum(window.seconds for window in windows)


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
    still, swapped = by["tokens_per_second_without_swaps"], by["tokens_per_second_with_swaps"]
    return [
        line(f"a swap by {name} under load", by["swap"]),
        f"swaps by {name}: {still:.1f} tok/s without them, {swapped:.1f} with "
        f"{by['swaps_per_minute']:.0f} a minute: {by['throughput_lost']:.1%} lost "
        f"(two standard errors: {by['throughput_lost_margin']:.1%})",
        f"{by['answers']} answers checked: {by['wrong_answers']} wrong, with "
        f"{by['wrong_tokens']} wrong tokens",
    ]


if __name__ == "__main__":
    main()

"""The hot-swap benchmark's load: streams that never pause, swaps at a steady rate, all checked.

A swap is a PUT through the server, or a publishing that another machine makes in the store.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

PROMPTS = (
    "The sea at night is",
    "Dear diary, today I",
    "The old man looked at the letter and",
    "Once upon a time, there was a little",
)


@dataclass(frozen=True)
class Answer:
    """pieces: the text of each chunk, which is a token as a rule; when it was sent and began."""

    pieces: tuple[str, ...]
    sent: float
    first: float


@dataclass
class Owner:
    """A user's adapter name and every swap of it: (begun, ended, variant)."""

    name: str
    prompt: str
    swaps: list[tuple[float, float, int]] = field(default_factory=list)

    def possible(self, answer: Answer) -> set[int]:
        """The variants that may have been current when the answer's request was taken in."""
        before = [swap for swap in self.swaps if swap[1] <= answer.sent]
        during = [s for s in self.swaps if s[1] > answer.sent and s[0] <= answer.first]
        return {variant for *_, variant in (*before[-1:], *during)}


@dataclass
class Window:
    """What happened in one stretch of time. swaps_per_minute: by the server's own count."""

    tokens_per_second: float
    swaps_per_minute: float
    answers: int
    wrong_answers: int
    wrong_tokens: int
    swap_seconds: list[float]


class Load:
    """`owners` stream answers of `tokens` without a pause; `make(variant)` is a fresh version's
    file, which `swap(name, file)` makes current.

    known[prompt, variant]: the pieces that a variant's greedy answer has.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        owners: list[Owner],
        tokens: int,
        make: Callable[[int], bytes],
        swap: Callable[[str, bytes], Awaitable[None]],
        known: dict[tuple[str, int], tuple[str, ...]],
    ) -> None:
        self._client = client
        self._owners = owners
        self._tokens = tokens
        self._make = make
        self._swap = swap
        self._known = known
        self._variants = sorted({variant for _, variant in known})

    async def run(self, seconds: float, swaps_per_minute: float) -> Window:
        """One window, counted after all streams have begun; answers then run to their end."""
        stop, begun = asyncio.Event(), asyncio.Event()
        answers: list[tuple[Owner, Answer]] = []
        started: set[str] = set()

        async def stream(owner: Owner) -> None:
            while not stop.is_set():
                answer = await ask(self._client, owner.name, owner.prompt, self._tokens)
                answers.append((owner, answer))
                started.add(owner.name)
                if len(started) == len(self._owners):
                    begun.set()

        async with asyncio.TaskGroup() as group:
            for owner in self._owners:
                group.create_task(stream(owner))
            await begun.wait()
            swapping = group.create_task(self._swap_all(swaps_per_minute, stop))
            before, at = await self._counts(), time.monotonic()
            await asyncio.sleep(seconds)
            after, at = await self._counts(), time.monotonic() - at
            stop.set()
        tokens, swaps = (b - a for a, b in zip(before, after, strict=True))
        wrong = [self._wrong_tokens(owner, answer) for owner, answer in answers]
        return Window(
            tokens_per_second=tokens / at,
            swaps_per_minute=60 * swaps / at,
            answers=len(answers),
            wrong_answers=sum(n > 0 for n in wrong),
            wrong_tokens=sum(wrong),
            swap_seconds=swapping.result(),
        )

    async def _swap_all(self, per_minute: float, stop: asyncio.Event) -> list[float]:
        """Swap at the given rate, owners in turn, each owner's swaps one after the other."""
        took: list[float] = []
        locks = {owner.name: asyncio.Lock() for owner in self._owners}

        async def swap(owner: Owner) -> None:
            async with locks[owner.name]:
                took.append(await self.swap(owner))

        if not per_minute:
            return took
        began, count = time.monotonic(), 0
        async with asyncio.TaskGroup() as group:
            while not stop.is_set():
                group.create_task(swap(self._owners[count % len(self._owners)]))
                count += 1
                due = began + count * 60 / per_minute
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        return took

    async def swap(self, owner: Owner) -> float:
        """Swap to the owner's next variant, as a version never seen before; seconds it took."""
        last = owner.swaps[-1][2] if owner.swaps else -1
        variant = self._variants[(last + 1) % len(self._variants)]
        data = self._make(variant)
        sent = time.monotonic()
        await self._swap(owner.name, data)
        answered = time.monotonic()
        owner.swaps.append((sent, answered, variant))
        return answered - sent

    async def _counts(self) -> tuple[float, float]:
        """The server's own counts of generated tokens and of swaps."""
        lines = (await self._client.get("/metrics")).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        names = ("lorasb_generation_tokens_total", "lorasb_loader_swaps_total")
        return float(values[names[0]]), float(values[names[1]])

    def _wrong_tokens(self, owner: Owner, answer: Answer) -> int:
        """Pieces that differ from the answer of the version that it ran on."""
        return min(
            _differing(self._known[owner.prompt, variant][: self._tokens], answer.pieces)
            for variant in owner.possible(answer)
        )


class PutClient:
    """PUTs over connections that stay open, at a tenth of a full client's processor time.

    The load shares its cores with the server, and what it takes for itself would be counted as
    the swaps' price.
    """

    def __init__(self, url: httpx.URL) -> None:
        self._host, self._port = url.host, url.port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def put(self, name: str, data: bytes) -> None:
        """Raises RuntimeError for any answer but 200."""
        while self._idle and self._idle[-1][0].at_eof():  # closed by the server meanwhile
            self._idle.pop()[1].close()
        if not self._idle:
            self._idle.append(await asyncio.open_connection(self._host, self._port))
        reader, writer = self._idle.pop()
        head = f"PUT /v1/adapters/{name} HTTP/1.1\r\nHost: {self._host}\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        sizes = [int(line[15:]) for line in headers if line.startswith("content-length:")]
        body = await reader.readexactly(sizes[0])
        if " 200 " not in status:
            raise RuntimeError(f"{status}: {body.decode()}")
        self._idle.append((reader, writer))


async def publish_elsewhere(store: Path, name: str, data: bytes) -> None:
    """What a publishing on another machine is to this one: two files that appear in the store."""
    folder = store / "default" / name
    version = hashlib.sha256(data).hexdigest()
    (folder / f"{version}.safetensors").write_bytes(data)
    aside = folder / ".current.tmp"
    aside.write_text(version)
    os.replace(aside, folder / "current")


async def ask(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> Answer:
    """A greedy streamed completion of exactly so many tokens."""
    body: dict[str, object] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
    }
    pieces = []
    sent = time.monotonic()
    first = 0.0
    body |= {"stream": True, "ignore_eos": True, "skip_special_tokens": False}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.monotonic()
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    return Answer(tuple(pieces), sent, first)


def _differing(known: tuple[str, ...], found: tuple[str, ...]) -> int:
    pairs = zip(known, found, strict=False)
    return sum(a != b for a, b in pairs) + abs(len(known) - len(found))

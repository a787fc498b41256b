"""The hot-swap benchmark's load: streams that never pause, swaps at a steady rate, all checked."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

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
    """A user's adapter name and every swap of it: (PUT sent, PUT answered, variant)."""

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
    """What happened in one stretch of time."""

    tokens_per_second: float
    swaps_per_minute: float
    answers: int
    wrong_answers: int
    wrong_tokens: int
    put_seconds: list[float]


class Load:
    """`owners` stream without a pause; `make(variant)` is a fresh version's file.

    known[prompt, variant]: the pieces that a variant's greedy answer has.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        owners: list[Owner],
        tokens: int,
        make: Callable[[int], bytes],
        known: dict[tuple[str, int], tuple[str, ...]],
    ) -> None:
        self._client = client
        self._owners = owners
        self._tokens = tokens
        self._make = make
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
            tokens, at = await self._generated(), time.monotonic()
            await asyncio.sleep(seconds)
            tokens, at = await self._generated() - tokens, time.monotonic() - at
            stop.set()
        puts = swapping.result()
        wrong = [self._wrong_tokens(owner, answer) for owner, answer in answers]
        return Window(
            tokens_per_second=tokens / at,
            swaps_per_minute=60 * len(puts) / at,
            answers=len(answers),
            wrong_answers=sum(n > 0 for n in wrong),
            wrong_tokens=sum(wrong),
            put_seconds=puts,
        )

    async def _swap_all(self, per_minute: float, stop: asyncio.Event) -> list[float]:
        """PUT at the given rate, owners in turn, each owner's swaps one after the other."""
        took: list[float] = []
        locks = {owner.name: asyncio.Lock() for owner in self._owners}

        async def swap(owner: Owner) -> None:
            async with locks[owner.name]:
                took.append(await self.put(owner))

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

    async def put(self, owner: Owner) -> float:
        """Swap to the owner's next variant, as a version never seen before; seconds it took."""
        last = owner.swaps[-1][2] if owner.swaps else -1
        variant = self._variants[(last + 1) % len(self._variants)]
        data = self._make(variant)
        sent = time.monotonic()
        response = await self._client.put(f"/v1/adapters/{owner.name}", content=data)
        response.raise_for_status()
        answered = time.monotonic()
        owner.swaps.append((sent, answered, variant))
        return answered - sent

    async def _generated(self) -> float:
        """The server's own count of generated tokens."""
        text = (await self._client.get("/metrics")).text
        lines = [x for x in text.splitlines() if x.startswith("lorasb_generation_tokens_total ")]
        return float(lines[0].split()[1])

    def _wrong_tokens(self, owner: Owner, answer: Answer) -> int:
        """Pieces that differ from the answer of the version that it ran on."""
        return min(
            _differing(self._known[owner.prompt, variant], answer.pieces)
            for variant in owner.possible(answer)
        )


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

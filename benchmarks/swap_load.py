"""The hot-swap benchmark's load: streams that never pause, swaps at a steady rate, all checked.

A swap is a PUT through the server, or a publishing that another machine makes in the store.
"""

import asyncio
import hashlib
import itertools
import os
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from swap_client import Answer, Client

# Two tokens each: a swap in the store needs a request that sees it, so these must be cheap.
PROMPTS = ("The sea", "Dear diary", "Once upon", "Old men")
DUE_SECONDS = 0.005  # to the next look for an owner whose version may be changed
LEAD_SECONDS = 0.8  # before each window, in which the last one's versions are asked for


@dataclass
class Owner:
    """A user's adapter name and every swap of it: (begun, ended, variant).

    asked: it has sent a request since its last swap of those that wait for one.
    """

    name: str
    prompt: str
    swaps: list[tuple[float, float, int]] = field(default_factory=list)
    asked: bool = False

    def possible(self, answer: Answer) -> set[int]:
        """The variants that may have been current when the answer's request was taken in."""
        before = [swap for swap in self.swaps if swap[1] <= answer.sent]
        during = [s for s in self.swaps if s[1] > answer.sent and s[0] <= answer.first]
        return {variant for *_, variant in (*before[-1:], *during)}


@dataclass(frozen=True)
class Window:
    """What happened in one stretch of time. swaps: by the server's own count, while it lasted.

    swap_seconds: what each publishing took, from LEAD_SECONDS before it.
    """

    seconds: float
    tokens: int
    swaps: float
    swap_seconds: list[float]


@dataclass(frozen=True)
class Run:
    """Windows without swaps and with them, in turn, and all answers that were given in them."""

    still: list[Window]
    swapped: list[Window]
    answers: int
    wrong_answers: int
    wrong_tokens: int


class Load:
    """`owners` stream answers of `tokens` without a pause; `make(variant)` is a fresh version's
    file, which `publish(name, file)` makes current.

    known[prompt, variant]: the pieces that a variant's greedy answer has. elsewhere: publishing is
    not the server's work. Then it goes on in all windows, in those without swaps for names that
    nobody asks for; and an owner gets a version only after it has asked for the last one, as one
    that was never asked for is no swap.
    """

    def __init__(
        self,
        client: Client,
        owners: list[Owner],
        tokens: int,
        make: Callable[[int], bytes],
        publish: Callable[[str, bytes], Awaitable[None]],
        known: dict[tuple[str, int], tuple[str, ...]],
        *,
        elsewhere: bool = False,
    ) -> None:
        self._client = client
        self._owners = owners
        self._tokens = tokens
        self._make = make
        self._publish = publish
        self._known = known
        self._elsewhere = elsewhere
        self._variants = sorted({variant for _, variant in known})

    async def run(self, pairs: int, seconds: float, swaps_per_minute: float) -> Run:
        """So many windows without swaps and as many with them, in turn, under the same streams.

        They begin when all streams have begun; answers run to their end.
        """
        stop, begun = asyncio.Event(), asyncio.Event()
        answers: list[tuple[Owner, Answer]] = []
        started: set[str] = set()

        async def stream(owner: Owner) -> None:
            while not stop.is_set():
                owner.asked = True
                answer = await self._client.ask(owner.name, owner.prompt, self._tokens)
                answers.append((owner, answer))
                started.add(owner.name)
                if len(started) == len(self._owners):
                    begun.set()

        spans = []
        async with asyncio.TaskGroup() as group:
            for owner in self._owners:
                group.create_task(stream(owner))
            await begun.wait()
            for _ in range(pairs):
                spans.append(await self._span(seconds, swaps_per_minute, swapping=False))
                spans.append(await self._span(seconds, swaps_per_minute, swapping=True))
            stop.set()
        arrived = sorted(at for _, answer in answers for at in answer.times)
        windows = [_window(arrived, *span) for span in spans]
        wrong = [self._wrong_tokens(owner, answer) for owner, answer in answers]
        return Run(windows[::2], windows[1::2], len(answers), sum(n > 0 for n in wrong), sum(wrong))

    async def _span(
        self, seconds: float, per_minute: float, *, swapping: bool
    ) -> tuple[float, float, float, list[float]]:
        """When it began and ended, the swaps in it, and what each took."""
        stop = asyncio.Event()
        publishing = None
        if swapping or self._elsewhere:
            change = self.swap if swapping else self._publish_unasked
            if_asked = swapping and self._elsewhere
            publishing = asyncio.create_task(
                self._change_all(change, per_minute, stop, if_asked=if_asked)
            )
        await asyncio.sleep(LEAD_SECONDS)
        before, began = await self._client.swaps(), time.monotonic()
        await asyncio.sleep(seconds)
        ended, swaps = time.monotonic(), await self._client.swaps() - before
        stop.set()
        return began, ended, swaps, await publishing if publishing else []

    async def _change_all(
        self,
        change: Callable[[Owner], Awaitable[float]],
        per_minute: float,
        stop: asyncio.Event,
        *,
        if_asked: bool,
    ) -> list[float]:
        """Change owners in turn at the given rate, each owner's changes one after the other.

        if_asked: only those who have sent a request since their last change.
        """
        took: list[float] = []
        locks = {owner.name: asyncio.Lock() for owner in self._owners}
        turns = itertools.cycle(self._owners)

        async def one(owner: Owner) -> None:
            async with locks[owner.name]:
                took.append(await change(owner))

        began, count = time.monotonic(), 0
        async with asyncio.TaskGroup() as group:
            while not stop.is_set():
                each = itertools.islice(turns, len(self._owners))
                owner = next((o for o in each if o.asked or not if_asked), None)
                if owner is None:
                    await asyncio.sleep(DUE_SECONDS)
                    continue
                owner.asked = owner.asked and not if_asked
                group.create_task(one(owner))
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
        await self._publish(owner.name, data)
        answered = time.monotonic()
        owner.swaps.append((sent, answered, variant))
        return answered - sent

    async def _publish_unasked(self, owner: Owner) -> float:
        """As much work for whoever publishes as a swap, and none for the server; seconds."""
        sent = time.monotonic()
        await self._publish(f"{owner.name}-unasked", self._make(self._variants[0]))
        return time.monotonic() - sent

    def _wrong_tokens(self, owner: Owner, answer: Answer) -> int:
        """Pieces that differ from the answer of the version that it ran on."""
        return min(
            _differing(self._known[owner.prompt, variant], answer.pieces)
            for variant in owner.possible(answer)
        )


async def publish_elsewhere(store: Path, name: str, data: bytes) -> None:
    """What a publishing on another machine is to this one: two files that appear in the store."""
    folder = store / "default" / name
    folder.mkdir(exist_ok=True)
    version = hashlib.sha256(data).hexdigest()
    (folder / f"{version}.safetensors").write_bytes(data)
    aside = folder / ".current.tmp"
    aside.write_text(version)
    os.replace(aside, folder / "current")


def _window(
    arrived: list[float], began: float, ended: float, swaps: float, took: list[float]
) -> Window:
    """The tokens of whole steps, which arrive together: between two arrivals, not two moments."""
    first, last = bisect_right(arrived, began) - 1, bisect_right(arrived, ended) - 1
    return Window(arrived[last] - arrived[first], last - first, swaps, took)


def _differing(known: tuple[str, ...], found: tuple[str, ...]) -> int:
    pairs = zip(known, found, strict=False)
    return sum(a != b for a, b in pairs) + abs(len(known) - len(found))

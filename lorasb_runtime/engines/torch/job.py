"""A request inside the engine: its sequences, and the way of its events to who waits for them."""

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field

from lorasb_runtime.engines.base import Chunk, GenerationRequest
from lorasb_runtime.engines.torch.output import SequenceOutput
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.engines.torch.structured import GrammarMatcher
from lorasb_runtime.errors import LorasbError

logger = logging.getLogger(__name__)

Event = Chunk | LorasbError


@dataclass
class Job:
    """`outputs` are those of its unfinished sequences; `posted` is in perf_counter's seconds."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Event]"
    matcher: GrammarMatcher | None
    outputs: dict[Sequence, SequenceOutput] = field(default_factory=dict)
    posted: float = field(default_factory=time.perf_counter)

    def sequences(self, longest: int) -> list[Sequence]:
        """A new one for each completion; longest: the context's length in tokens."""
        request = self.request
        params = request.sampling
        room = longest - len(request.prompt)
        limit = len(request.prompt) + min(room, params.max_tokens or room)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return [
            Sequence(
                request.request_id,
                index,
                list(request.prompt),
                len(request.prompt),
                limit,
                params,
                seed,
                request.adapter,
                request.tenant,
                matcher=self.matcher.copy() if self.matcher else None,
                posted=self.posted,
            )
            for index in range(request.n)
        ]

    def send(self, event: Event) -> None:
        """Hand an event over to the caller's loop, from the engine's thread."""
        send_all([(self, event)])


def send_all(events: list[tuple[Job, Event]]) -> None:
    """Hand events over to their callers, from the engine's thread; each loop is woken once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Event]]] = {}
    for job, event in events:
        by_loop.setdefault(job.loop, []).append((job, event))
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, own)
        except RuntimeError:  # the callers' loop is closed: nobody is left to tell
            logger.debug("%d events have no listener", len(own))


def _put(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)

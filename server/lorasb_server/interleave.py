"""Several streams as one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from lorasb_runtime.errors import LorasbError

T = TypeVar("T")


async def interleave(
    streams: list[AsyncIterator[T]], stop: "asyncio.Future[LorasbError]"
) -> AsyncGenerator[tuple[int, T], None]:
    """What the streams bring with the stream's index, each as soon as it is there.

    The first error ends all of them, and so does the one of `stop`: at once, whether or not
    anybody waits for what comes next.
    """
    queue: asyncio.Queue[tuple[int, T | None] | LorasbError] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[T]) -> None:
        try:
            async for item in stream:
                queue.put_nowait((index, item))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]

    def halt(stopped: "asyncio.Future[LorasbError]") -> None:
        queue.put_nowait(stopped.result())
        for task in tasks:
            task.cancel()

    stop.add_done_callback(halt)
    unfinished = len(tasks)
    try:
        while unfinished:
            match await queue.get():
                case LorasbError() as error:
                    raise error
                case (index, None):
                    unfinished -= 1
                    await tasks[index]
                case (index, item):
                    yield index, item
    finally:
        stop.remove_done_callback(halt)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

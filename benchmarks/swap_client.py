"""The hot-swap benchmark's HTTP client."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

ANSWER_SECONDS = 300
IDLE_SECONDS = 2  # the server closes a connection that has been idle for 5


@dataclass(frozen=True)
class Answer:
    """pieces: the text of each chunk, which is a token as a rule; times: when each arrived."""

    pieces: tuple[str, ...]
    times: tuple[float, ...]
    sent: float

    @property
    def first(self) -> float:
        return self.times[0]


class Client:
    """HTTP over connections that stay open, at a small part of a full client's processor time.

    The load shares its cores with the server, and what it takes for itself would be counted as
    the swaps' price.
    """

    def __init__(self, url: httpx.URL) -> None:
        self._host, self._port = url.host, url.port
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def put(self, name: str, data: bytes) -> None:
        """Publish an adapter's file. Raises RuntimeError for any answer but 200."""
        async with self._answer("PUT", f"/v1/adapters/{name}", data) as (reader, headers):
            await reader.readexactly(int(headers["content-length"]))

    async def ask(self, model: str, prompt: str, tokens: int) -> Answer:
        """A greedy streamed completion of exactly so many tokens."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        pieces, times = [], []
        sent = time.monotonic()
        data = json.dumps(body).encode()
        async with self._answer("POST", "/v1/completions", data) as (reader, _):
            # Between the events' lines are those that tell the chunks' sizes, the last one's 0.
            while (line := await reader.readline()) != b"data: [DONE]\n":
                if line.startswith(b"data: {"):
                    times.append(time.monotonic())
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
            await reader.readuntil(b"\r\n0\r\n\r\n")
        return Answer(tuple(pieces), tuple(times), sent)

    async def swaps(self) -> float:
        """The server's own count of swaps."""
        async with self._answer("GET", "/metrics", b"") as (reader, headers):
            text = (await reader.readexactly(int(headers["content-length"]))).decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        return float(values["lorasb_loader_swaps_total"])

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, data: bytes
    ) -> AsyncIterator[tuple[asyncio.StreamReader, dict[str, str]]]:
        """What reads the answer's body, and its headers; the body has to be read to its end.

        Raises TimeoutError for an answer that does not end in ANSWER_SECONDS.
        """
        now = time.monotonic()
        while self._idle and self._idle[0][0] < now - IDLE_SECONDS:
            self._idle.pop(0)[2].close()
        if self._idle:
            _, reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        async with asyncio.timeout(ANSWER_SECONDS):
            head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(data)}"
            writer.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + data)
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = {
                name.lower(): value for name, value in (line.split(": ", 1) for line in lines)
            }
            if " 200 " not in status:
                body = await reader.readexactly(int(headers["content-length"]))
                raise RuntimeError(f"{method} {path}: {status}: {body.decode()}")
            yield reader, headers
        self._idle.append((time.monotonic(), reader, writer))

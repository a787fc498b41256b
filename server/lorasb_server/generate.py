"""Runs the prompts of one HTTP request on the engine and brings their chunks together."""

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import Request

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.engines.base import Chunk, GenerationRequest, SamplingParams, TokenLogprob
from lorasb_server.errors import FieldError
from lorasb_server.service import Service
from lorasb_server.tenants.caller import Caller

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


@dataclass
class Generation:
    """A checked request that is ready to run: prompts as tokens, `n` completions of each.

    Choice index = prompt's index * n + completion's index. Counts the tokens as they come. With
    `prompt_only` what the engine generates is dropped, and each completion ends for its length.
    """

    service: Service
    caller: Caller
    prompts: list[list[int]]
    sampling: SamplingParams
    adapter: LoadedAdapter | None
    n: int
    prompt_only: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """(choice index, chunk) of all prompts as they come; closing it ends all of them.

        Raises QuotaError before the first where the tenant has no tokens left for today.
        """
        started = time.monotonic()
        metrics, meter, tenant = self.service.metrics, self.service.meter, self.caller.tenant
        meter.check_tokens(tenant, self.caller.quota)
        meter.spend(tenant, self.prompt_tokens)
        metrics.prompt_tokens.inc(self.prompt_tokens)
        if self.adapter is not None:
            metrics.count_adapter(str(self.adapter.name))
        waiting = True
        async with contextlib.aclosing(_interleave(self._streams())) as stream:
            async for prompt, said in stream:
                chunk = _without_output(said) if self.prompt_only else said
                if waiting:
                    metrics.first_token.observe(time.monotonic() - started)
                    waiting = False
                self.completion_tokens += len(chunk.tokens)
                meter.spend(tenant, len(chunk.tokens))
                self.cached_tokens += chunk.cached_tokens
                if chunk.index == 0:
                    self.prompt_logprobs.setdefault(prompt, chunk.prompt_logprobs)
                metrics.generation_tokens.inc(len(chunk.tokens))
                yield prompt * self.n + chunk.index, chunk

    async def collect(self) -> list["Choice"]:
        """All completions, whole, in order of their index."""
        choices = [Choice() for _ in range(len(self.prompts) * self.n)]
        async with contextlib.aclosing(self.chunks()) as stream:
            async for index, chunk in stream:
                choices[index].add(chunk)
        return choices

    def shown_prompt_logprobs(self, prompt: int) -> list[dict[str, Any] | None]:
        """As vLLM shows them: for each prompt token, by token id; the first has none."""
        codec = self.service.engine.codec
        shown: list[dict[str, Any] | None] = [None]
        for entry in self.prompt_logprobs.get(prompt, ()):
            ranked: dict[int, tuple[float, int | None]] = {
                token: (value, rank) for rank, (token, value) in enumerate(entry.top, start=1)
            }
            ranked.setdefault(entry.token, (entry.logprob, None))
            shown.append(
                {
                    str(token): {
                        "logprob": finite(value),
                        "rank": rank,
                        "decoded_token": codec.token_text(token),
                    }
                    for token, (value, rank) in ranked.items()
                }
            )
        return shown

    def _streams(self) -> list[AsyncIterator[Chunk]]:
        return [
            self.service.engine.generate(
                GenerationRequest(
                    f"{self.id}-{i}",
                    tuple(prompt),
                    self.sampling,
                    self.adapter,
                    self.n,
                    self.caller.tenant,
                )
            )
            for i, prompt in enumerate(self.prompts)
        ]


@dataclass
class Choice:
    """One completion as far as it has come, or what of it has not been sent yet."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason


def _without_output(chunk: Chunk) -> Chunk:
    return replace(chunk, text="", tokens=(), logprobs=(), finish_reason="length")


def finite(logprob: float) -> float | None:
    """JSON has no infinity: a token that could not be chosen is shown as OpenAI does.

    None for NaN, the log-probability of a token that has none.
    """
    return None if math.isnan(logprob) else max(logprob, -9999.0)


def check_limits(
    service: Service,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    n: int,
    *,
    asked: int | None,
    length_param: str,
) -> None:
    """Refuse what the server or the model has no room for.

    asked: the tokens that the caller wants generated, None for as many as fit. length_param is
    the field that a refusal for length names.
    """
    longest = service.engine.info.max_model_len
    vocab = service.engine.info.vocab_size
    if n > service.config.max_n:
        raise FieldError("n", f"n: found {n}, expected at most {service.config.max_n}")
    for param, tokens in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if tokens and max(tokens) >= vocab:
            message = f"{param}: found token id {max(tokens)}, expected one below {vocab}"
            raise FieldError(param, message)
    asked = asked or 1
    for prompt in prompts:
        if len(prompt) + asked > longest:
            raise FieldError(
                length_param,
                f"This model's maximum context length is {longest} tokens; found {len(prompt)} "
                f"in the prompt and {asked} to be generated",
                "context_length_exceeded",
            )
        if not prompt:
            raise FieldError("prompt", "prompt: found no tokens, expected at least one")
        if max(prompt) >= vocab:
            raise FieldError(
                "prompt", f"prompt: found token id {max(prompt)}, expected one below {vocab}"
            )


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _interleave(
    streams: list[AsyncIterator[Chunk]],
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Chunks of several streams with the stream's index, each as soon as it is there.

    The first error ends all of them.
    """
    queue: asyncio.Queue[tuple[int, Chunk | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Chunk]) -> None:
        try:
            async for chunk in stream:
                queue.put_nowait((index, chunk))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]
    unfinished = len(tasks)
    try:
        while unfinished:
            index, chunk = await queue.get()
            if chunk is None:
                unfinished -= 1
                await tasks[index]
            else:
                yield index, chunk
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

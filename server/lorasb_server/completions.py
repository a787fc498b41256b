"""POST /v1/completions."""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorasb_runtime.engines.base import Chunk, TokenLogprob
from lorasb_runtime.models.text import TextCodec
from lorasb_server.auth import AnyCaller
from lorasb_server.documented import generated
from lorasb_server.exchange import Exchange
from lorasb_server.generate import Choice, Generation, check_limits, finite
from lorasb_server.schemas.answers import Completion
from lorasb_server.schemas.completions import CompletionRequest
from lorasb_server.service import Service
from lorasb_server.sse import event_stream
from lorasb_server.tenants.caller import Caller


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/v1/completions", responses=generated(Completion))
    async def completions(body: CompletionRequest, request: Request, caller: AnyCaller) -> Response:
        async def answer(exchange: Exchange) -> Response:
            generation = await _prepare(service, caller, exchange, body)
            if body.stream:
                return await event_stream(_stream(body, generation))
            return JSONResponse(_whole(body, generation, await generation.collect()))

        return await service.answer(request, len(body.prompts()) * (body.n or 1), answer)

    return router


async def _prepare(
    service: Service, caller: Caller, exchange: Exchange, body: CompletionRequest
) -> Generation:
    _ = body.wants_usage
    params = body.parameters()
    adapter = await service.resolve(caller, body.model, body.adapter)
    encode = service.engine.codec.encode

    def tokens() -> list[list[int]]:
        return [encode(p) if isinstance(p, str) else p for p in body.prompts()]

    prompts = await asyncio.to_thread(tokens)
    n = body.n or 1
    check_limits(service, prompts, params, n, asked=body.max_tokens, length_param="max_tokens")
    return Generation(service, caller, exchange, prompts, params, adapter, n, body.prompt_only)


def _whole(
    body: CompletionRequest, generation: Generation, choices: list[Choice]
) -> dict[str, Any]:
    codec = generation.service.engine.codec
    shown = []
    for index, choice in enumerate(choices):
        echo = _echo(body, generation, index)
        entries = [*echo.logprobs, *choice.logprobs]
        shown.append(
            {
                "index": index,
                "text": echo.text + choice.text,
                "logprobs": _logprobs(body, codec, entries, 0),
                "finish_reason": choice.finish_reason,
                **_prompt_logprobs(body, generation, index),
            }
        )
    return {**_head(body, generation), "choices": shown, "usage": generation.usage()}


def _prompt_logprobs(body: CompletionRequest, generation: Generation, index: int) -> dict[str, Any]:
    if body.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": generation.shown_prompt_logprobs(index // generation.n)}


def _echo(body: CompletionRequest, generation: Generation, index: int) -> Choice:
    """What completion `index` begins with: nothing, or with `echo` its prompt.

    A prompt's text is as it was given, or decoded from its tokens. Its first token has no
    log-probability, which is NaN here.
    """
    if not body.echo:
        return Choice()
    prompt = index // generation.n
    text = body.prompts()[prompt]
    if not isinstance(text, str):
        skip = generation.sampling.skip_special_tokens
        text = generation.service.engine.codec.decode(text, skip_special_tokens=skip)
    if not body.echoes_logprobs:
        return Choice(text)
    first = TokenLogprob(generation.prompts[prompt][0], math.nan)
    return Choice(text, [first, *generation.prompt_logprobs[prompt]])


async def _prompts_first(
    chunks: AsyncGenerator[tuple[int, Chunk], None], n: int
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Holds a prompt's other completions back until its first, which brings the prompt's scores."""
    held: dict[int, list[tuple[int, Chunk]]] = {}
    begun = set()
    async for index, chunk in chunks:
        prompt = index // n
        held.setdefault(prompt, []).append((index, chunk))
        if index % n == 0:
            begun.add(prompt)
        if prompt in begun:
            for item in held.pop(prompt):
                yield item


async def _stream(
    body: CompletionRequest, generation: Generation
) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks in OpenAI's form: text with the reason on the last of each, then the usage."""
    head = _head(body, generation)
    if body.wants_usage:
        head["usage"] = None
    codec = generation.service.engine.codec
    pending: dict[int, Choice] = {}
    sent: dict[int, int] = {}
    async with contextlib.aclosing(generation.chunks()) as chunks:
        ordered = _prompts_first(chunks, generation.n) if body.echoes_logprobs else chunks
        async for index, chunk in ordered:
            if index not in pending:
                pending[index] = _echo(body, generation, index)
            choice = pending[index]
            choice.add(chunk)
            if not choice.text and choice.finish_reason is None:
                continue
            offset = sent.get(index, 0)
            yield {
                **head,
                "choices": [
                    {
                        "index": index,
                        "text": choice.text,
                        "logprobs": _logprobs(body, codec, choice.logprobs, offset),
                        "finish_reason": choice.finish_reason,
                    }
                ],
            }
            sent[index] = offset + sum(len(codec.token_text(e.token)) for e in choice.logprobs)
            choice.text, choice.logprobs = "", []
    if body.wants_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


def _head(body: CompletionRequest, generation: Generation) -> dict[str, Any]:
    return {
        "id": f"cmpl-{generation.id}",
        "object": "text_completion",
        "created": generation.created,
        "model": body.model,
    }


def _logprobs(
    body: CompletionRequest, codec: TextCodec, entries: list[TokenLogprob], offset: int
) -> dict[str, Any] | None:
    """OpenAI's older form: parallel lists; text_offset counts characters of the tokens' texts.

    The chosen token is among the top ones, so that they may be one more than asked for.
    """
    if body.logprobs is None:
        return None
    tokens = [codec.token_text(entry.token) for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(entry.logprob) for entry in entries],
        "top_logprobs": [
            None
            if math.isnan(entry.logprob)
            else {
                codec.token_text(token): finite(value)
                for token, value in (*entry.top, (entry.token, entry.logprob))
            }
            for entry in entries
        ],
        "text_offset": offsets,
    }

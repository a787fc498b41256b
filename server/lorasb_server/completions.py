"""POST /v1/completions."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorasb_runtime.engines.base import TokenLogprob
from lorasb_runtime.models.text import TextCodec
from lorasb_server.auth import AnyCaller
from lorasb_server.documented import generated
from lorasb_server.generate import Choice, Generation, check_limits, finite, unless_gone
from lorasb_server.schemas.answers import Completion
from lorasb_server.schemas.completions import CompletionRequest
from lorasb_server.service import Service
from lorasb_server.sse import event_stream
from lorasb_server.tenants.caller import Caller


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/v1/completions", responses=generated(Completion))
    async def completions(body: CompletionRequest, request: Request, caller: AnyCaller) -> Response:
        generation = await _prepare(service, caller, body)
        if body.stream:
            payloads = _stream(body, generation)
            return await unless_gone(request, event_stream(payloads))
        choices = await unless_gone(request, generation.collect())
        return JSONResponse(_whole(body, generation, choices))

    return router


async def _prepare(service: Service, caller: Caller, body: CompletionRequest) -> Generation:
    _ = body.wants_usage
    params = body.parameters()
    adapter = await service.resolve(caller, body.model, body.adapter)
    encode = service.engine.codec.encode

    def tokens() -> list[list[int]]:
        return [encode(p) if isinstance(p, str) else p for p in body.prompts()]

    prompts = await asyncio.to_thread(tokens)
    n = body.n or 1
    check_limits(service, prompts, params, n, asked=body.max_tokens, length_param="max_tokens")
    return Generation(service, caller, prompts, params, adapter, n)


def _whole(
    body: CompletionRequest, generation: Generation, choices: list[Choice]
) -> dict[str, Any]:
    codec = generation.service.engine.codec
    return {
        **_head(body, generation),
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "logprobs": _logprobs(body, codec, choice.logprobs, 0),
                "finish_reason": choice.finish_reason,
                **_prompt_logprobs(body, generation, index),
            }
            for index, choice in enumerate(choices)
        ],
        "usage": generation.usage(),
    }


def _prompt_logprobs(body: CompletionRequest, generation: Generation, index: int) -> dict[str, Any]:
    if body.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": generation.shown_prompt_logprobs(index // generation.n)}


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
        async for index, chunk in chunks:
            choice = pending.setdefault(index, Choice())
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
    """OpenAI's older form: parallel lists; text_offset counts characters of the completion.

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
            {
                codec.token_text(token): finite(value)
                for token, value in (*entry.top, (entry.token, entry.logprob))
            }
            for entry in entries
        ],
        "text_offset": offsets,
    }

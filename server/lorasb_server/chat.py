"""POST /v1/chat/completions."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorasb_runtime.engines.base import TokenLogprob
from lorasb_runtime.models.text import TextCodec
from lorasb_server.auth import AnyCaller
from lorasb_server.documented import generated
from lorasb_server.generate import Choice, Generation, check_limits, finite, unless_gone
from lorasb_server.schemas.answers import ChatCompletion
from lorasb_server.schemas.chat import ChatRequest
from lorasb_server.service import Service
from lorasb_server.sse import event_stream
from lorasb_server.tenants.caller import Caller


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/v1/chat/completions", responses=generated(ChatCompletion))
    async def chat_completions(body: ChatRequest, request: Request, caller: AnyCaller) -> Response:
        generation = await prepare_chat(service, caller, body)
        if body.stream:
            payloads = _stream(body, generation)
            return await unless_gone(request, event_stream(payloads))
        choices = await unless_gone(request, generation.collect())
        return JSONResponse(_whole(body, generation, choices))

    return router


async def prepare_chat(service: Service, caller: Caller, body: ChatRequest) -> Generation:
    """The conversation as tokens, checked and ready to run."""
    _ = body.wants_usage
    params = body.parameters()
    adapter = await service.resolve(caller, body.model, body.adapter)
    codec = service.engine.codec
    prompt = await asyncio.to_thread(codec.encode_chat, body.template_input())
    n = body.n or 1
    length_param = body.limit_field or "messages"
    check_limits(service, [prompt], params, n, asked=params.max_tokens, length_param=length_param)
    return Generation(service, caller, [prompt], params, adapter, n)


def _whole(body: ChatRequest, generation: Generation, choices: list[Choice]) -> dict[str, Any]:
    codec = generation.service.engine.codec
    return {
        **_head(body, generation, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _logprobs(body, codec, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": generation.usage(),
        **_prompt_logprobs(body, generation),
    }


def _prompt_logprobs(body: ChatRequest, generation: Generation) -> dict[str, Any]:
    if body.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": generation.shown_prompt_logprobs(0)}


async def _stream(
    body: ChatRequest, generation: Generation
) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks in OpenAI's form: first the role, then text, last the reason, then the usage."""
    head = _head(body, generation, "chat.completion.chunk")
    if body.wants_usage:
        head["usage"] = None
    codec = generation.service.engine.codec
    pending: dict[int, Choice] = {}

    def payload(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**head, "choices": [{**choice, **more}]}

    async with contextlib.aclosing(generation.chunks()) as chunks:
        async for index, chunk in chunks:
            if index not in pending:
                pending[index] = Choice()
                yield payload(index, {"role": "assistant", "content": ""})
            choice = pending[index]
            choice.add(chunk)
            if choice.text:
                logprobs = _logprobs(body, codec, choice.logprobs)
                yield payload(index, {"content": choice.text}, logprobs=logprobs)
                choice.text, choice.logprobs = "", []
            if choice.finish_reason is not None:
                rest = _logprobs(body, codec, choice.logprobs) if choice.logprobs else None
                yield payload(index, {}, logprobs=rest, finish_reason=choice.finish_reason)
    if body.wants_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


def _head(body: ChatRequest, generation: Generation, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{generation.id}",
        "object": kind,
        "created": generation.created,
        "model": body.model,
    }


def _logprobs(
    body: ChatRequest, codec: TextCodec, entries: list[TokenLogprob]
) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return {"content": shown_logprobs(codec, entries), "refusal": None}


def shown_logprobs(codec: TextCodec, entries: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """As OpenAI shows tokens that were chosen, each with the likeliest ones."""
    return [
        {
            **_token(codec, entry.token, entry.logprob),
            "top_logprobs": [_token(codec, token, value) for token, value in entry.top],
        }
        for entry in entries
    ]


def _token(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    """Bytes are null for a token of part of a character: its text is the vocabulary's spelling."""
    text = codec.token_text(token)
    whole = codec.decode([token], skip_special_tokens=False) == text
    return {
        "token": text,
        "logprob": finite(logprob),
        "bytes": list(text.encode()) if whole else None,
    }

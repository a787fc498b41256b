"""POST /v1/chat/completions."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorasb_runtime.engines.base import TokenLogprob
from lorasb_runtime.models.text import TextCodec
from lorasb_server.auth import AnyCaller
from lorasb_server.documented import generated
from lorasb_server.exchange import Exchange
from lorasb_server.generate import Choice, Generation, check_limits, finite
from lorasb_server.schemas.answers import ChatCompletion
from lorasb_server.schemas.chat import ChatRequest
from lorasb_server.service import Service
from lorasb_server.sse import event_stream
from lorasb_server.tenants.caller import Caller
from lorasb_server.toolcalls.prompt import chat_tokens
from lorasb_server.toolcalls.reader import ArgumentsDelta, CallBegin, CallReader, Delta, TextDelta
from lorasb_server.toolcalls.tool_use import ToolUse


@dataclass(frozen=True)
class Conversation:
    """A checked chat request that is ready to run, and how its answer is read."""

    generation: Generation
    tools: ToolUse


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/v1/chat/completions", responses=generated(ChatCompletion))
    async def chat_completions(body: ChatRequest, request: Request, caller: AnyCaller) -> Response:
        async def answer(exchange: Exchange) -> Response:
            chat = await prepare_chat(service, caller, exchange, body)
            if body.stream:
                return await event_stream(_stream(body, chat))
            return JSONResponse(_whole(body, chat, await chat.generation.collect()))

        return await service.answer(request, body.n or 1, answer)

    return router


async def prepare_chat(
    service: Service, caller: Caller, exchange: Exchange, body: ChatRequest
) -> Conversation:
    """The conversation as tokens, checked and ready to run."""
    _ = body.wants_usage
    params = body.parameters()
    adapter = await service.resolve(caller, body.model, body.adapter)
    codec = service.engine.codec
    use = ToolUse.of(body, codec)
    options = body.template_options()
    prompt = await asyncio.to_thread(
        chat_tokens, codec, body.template_input(), use.tools, forced=use.forced, **options
    )
    n = body.n or 1
    length_param = body.limit_field or "messages"
    check_limits(service, [prompt], params, n, asked=params.max_tokens, length_param=length_param)
    sampling = use.sampling(params, codec)
    generation = Generation(service, caller, exchange, [prompt], sampling, adapter, n)
    return Conversation(generation, use)


def _whole(body: ChatRequest, chat: Conversation, choices: list[Choice]) -> dict[str, Any]:
    generation = chat.generation
    codec = generation.service.engine.codec
    shown = []
    for index, choice in enumerate(choices):
        message = read_message(chat.tools, choice.text)
        calls = len(message.get("tool_calls", ()))
        shown.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(body, codec, choice.logprobs),
                "finish_reason": chat.tools.finish_reason(choice.finish_reason, calls),
            }
        )
    return {
        **_head(body, generation, "chat.completion"),
        "choices": shown,
        "usage": generation.usage(),
        **_prompt_logprobs(body, generation),
    }


def read_message(tools: ToolUse, text: str) -> dict[str, Any]:
    """An answer's text as the assistant's message."""
    reader = tools.reader()
    content, calls = "", []
    functions: list[dict[str, str]] = []
    for delta in (*reader.feed(text), *reader.finish()):
        match delta:
            case TextDelta():
                content += delta.text
            case CallBegin():
                functions.append({"name": delta.name, "arguments": ""})
                calls.append({"id": delta.id, "type": "function", "function": functions[-1]})
            case ArgumentsDelta():
                functions[delta.index]["arguments"] += delta.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    return message


def _prompt_logprobs(body: ChatRequest, generation: Generation) -> dict[str, Any]:
    if body.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": generation.shown_prompt_logprobs(0)}


async def _stream(body: ChatRequest, chat: Conversation) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks in OpenAI's form: first the role, then text and calls, the reason, the usage."""
    generation = chat.generation
    head = _head(body, generation, "chat.completion.chunk")
    if body.wants_usage:
        head["usage"] = None
    codec = generation.service.engine.codec
    readers: dict[int, CallReader] = {}
    unsent: dict[int, list[TokenLogprob]] = {}  # of tokens that gave nothing to send so far

    def payload(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        entries = unsent[index] if delta.keys() - {"role"} or reason else []
        logprobs = _logprobs(body, codec, entries) if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if entries:
            unsent[index] = []
        return {**head, "choices": [choice]}

    async with contextlib.aclosing(generation.chunks()) as chunks:
        async for index, chunk in chunks:
            if index not in readers:
                readers[index], unsent[index] = chat.tools.reader(), []
                yield payload(index, {"role": "assistant", "content": ""})
            reader = readers[index]
            unsent[index] += chunk.logprobs
            for delta in reader.feed(chunk.text):
                yield payload(index, _delta(delta))
            if chunk.finish_reason is not None:
                for delta in reader.finish():
                    yield payload(index, _delta(delta))
                reason = chat.tools.finish_reason(chunk.finish_reason, reader.calls)
                yield payload(index, {}, reason)
    if body.wants_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


def _delta(delta: Delta) -> dict[str, Any]:
    match delta:
        case TextDelta():
            return {"content": delta.text}
        case CallBegin():
            function = {"name": delta.name, "arguments": ""}
            call: dict[str, Any] = {"id": delta.id, "type": "function", "function": function}
        case ArgumentsDelta():
            call = {"function": {"arguments": delta.text}}
    return {"tool_calls": [{"index": delta.index, **call}]}


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

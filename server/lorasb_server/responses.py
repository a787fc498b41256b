"""POST /v1/responses: OpenAI's Responses API for text, on chat's machinery. Nothing is kept."""

import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorasb_runtime.engines.base import Chunk
from lorasb_runtime.errors import InputError, LorasbError, OverloadedError
from lorasb_server.auth import AnyCaller
from lorasb_server.chat import prepare_chat, shown_logprobs
from lorasb_server.documented import generated
from lorasb_server.errors import FieldError
from lorasb_server.exchange import Exchange
from lorasb_server.generate import Generation
from lorasb_server.response_output import Event, ResponseOutput
from lorasb_server.schemas.answers import ResponseAnswer
from lorasb_server.schemas.responses import ResponsesRequest, renamed
from lorasb_server.service import Service
from lorasb_server.sse import event_stream
from lorasb_server.tenants.caller import Caller

logger = logging.getLogger(__name__)


def response_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/v1/responses", responses=generated(ResponseAnswer))
    async def responses(body: ResponsesRequest, request: Request, caller: AnyCaller) -> Response:
        async def answer(exchange: Exchange) -> Response:
            response = await _prepare(service, caller, exchange, body)
            if body.stream:
                return await event_stream(response.stream())
            return JSONResponse(await response.collect())

        return await service.answer(request, 1, answer)

    return router


async def _prepare(
    service: Service, caller: Caller, exchange: Exchange, body: ResponsesRequest
) -> "Answer":
    try:
        chat = await prepare_chat(service, caller, exchange, body.as_chat())
    except FieldError as error:
        raise renamed(error) from None
    return Answer(body, chat.generation)


@dataclass
class Answer:
    """One response while it is generated."""

    body: ResponsesRequest
    generation: Generation
    output: ResponseOutput = field(default_factory=ResponseOutput)
    finish_reason: str | None = None

    async def collect(self) -> dict[str, Any]:
        """The response once it is whole."""
        async with contextlib.aclosing(self.generation.chunks()) as chunks:
            async for _, chunk in chunks:
                self._take(chunk)
        return self._ended()

    async def stream(self) -> AsyncGenerator[Event, None]:
        """OpenAI's events, numbered.

        The first chunk is awaited first, so that an error before it still has its own HTTP status;
        one after it ends the response as failed.
        """
        numbers = itertools.count()
        async with contextlib.aclosing(self._events()) as events:
            async for event in events:
                yield {**event, "sequence_number": next(numbers)}

    async def _events(self) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(self.generation.chunks()) as chunks:
            _, first = await anext(chunks)
            for kind in ("created", "in_progress"):
                yield {"type": f"response.{kind}", "response": self._shown("in_progress")}
            try:
                for event in self._take(first):
                    yield event
                async for _, chunk in chunks:
                    for event in self._take(chunk):
                        yield event
            except LorasbError as error:
                yield self._failed(_code(error), str(error))
                return
            except Exception:
                logger.exception("a response failed")
                yield self._failed("server_error", "internal error")
                return
        response = self._ended()
        yield {"type": f"response.{response['status']}", "response": response}

    def _take(self, chunk: Chunk) -> list[Event]:
        codec = self.generation.service.engine.codec
        logprobs = shown_logprobs(codec, chunk.logprobs) if self.body.wants_logprobs else []
        events = list(self.output.text(chunk.text, logprobs))
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason
            events += self.output.finish(self._status())
        return events

    def _status(self) -> str:
        return "completed" if self.finish_reason == "stop" else "incomplete"

    def _ended(self) -> dict[str, Any]:
        status = self._status()
        ended: dict[str, Any] = {"usage": _usage(self.generation)}
        if status == "completed":
            ended["completed_at"] = int(time.time())
        else:
            ended["incomplete_details"] = {"reason": "max_output_tokens"}
        return {**self._shown(status), **ended}

    def _failed(self, code: str, message: str) -> Event:
        error = {"code": code, "message": message}
        response = {**self._shown("failed"), "error": error}
        return {"type": "response.failed", "response": response}

    def _shown(self, status: str) -> dict[str, Any]:
        """The response object: the settings with their defaults, and the output so far."""
        body = self.body
        return {
            "id": f"resp_{self.generation.id}",
            "object": "response",
            "created_at": self.generation.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": body.model,
            "output": list(self.output.items),
            "usage": None,
            "background": False,
            "conversation": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt": None,
            "prompt_cache_key": body.prompt_cache_key,
            "prompt_cache_retention": body.prompt_cache_retention,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": self.generation.sampling.temperature,
            "text": _text_config(body),
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self.generation.sampling.top_p,
            "truncation": "disabled",
            "user": body.user,
        }


def _text_config(body: ResponsesRequest) -> dict[str, Any]:
    form = body.text.format if body.text else None
    shown = {"type": "text"} if form is None else form.model_dump(by_alias=True)
    return {"format": shown, "verbosity": "medium"}


def _usage(generation: Generation) -> dict[str, Any]:
    """The prefix cache fills by itself, so nothing counts as written to it on demand."""
    usage = generation.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _code(error: LorasbError) -> str:
    """OpenAI's code for a response that failed."""
    if isinstance(error, OverloadedError):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, InputError) else "server_error"

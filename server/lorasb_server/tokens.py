"""POST /tokenize and /detokenize, as vLLM has them."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from lorasb_server.auth import AnyCaller
from lorasb_server.documented import failures
from lorasb_server.errors import FieldError
from lorasb_server.schemas.answers import Detokenized, Tokenized
from lorasb_server.schemas.messages import Message
from lorasb_server.schemas.sampling import TokenId
from lorasb_server.schemas.strict import Strict, Text
from lorasb_server.service import Service
from lorasb_server.toolcalls.prompt import chat_tokens


class TokenizeRequest(Strict):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def token_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["tokens"], responses=failures(400, 401, 404, 413, 503))
    codec = service.engine.codec
    info = service.engine.info

    @router.post("/tokenize", response_model=Tokenized)
    async def tokenize(body: TokenizeRequest, caller: AnyCaller) -> dict[str, Any]:
        if body.model is not None:
            await service.resolve(caller, body.model, None)
        if (body.prompt is None) == (body.messages is None):
            raise FieldError("prompt", "prompt: expected exactly one of prompt and messages")
        if body.messages is not None:
            if body.add_special_tokens is not None:
                raise FieldError("add_special_tokens", "add_special_tokens: goes with prompt")
            tokens = await asyncio.to_thread(
                chat_tokens,
                codec,
                [m.as_template_input() for m in body.messages],
                [],
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        else:
            if body.add_generation_prompt is not None:
                raise FieldError(
                    "add_generation_prompt", "add_generation_prompt: goes with messages"
                )
            special = body.add_special_tokens is not False
            tokens = await asyncio.to_thread(
                codec.encode, body.prompt or "", special_tokens=special
            )
        return {"count": len(tokens), "max_model_len": info.max_model_len, "tokens": tokens}

    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest, caller: AnyCaller) -> dict[str, Any]:
        if body.model is not None:
            await service.resolve(caller, body.model, None)
        if body.tokens and max(body.tokens) >= info.vocab_size:
            raise FieldError("tokens", f"tokens: found {max(body.tokens)}, over the vocabulary")
        text = await asyncio.to_thread(codec.decode, body.tokens, skip_special_tokens=False)
        return {"prompt": text}

    return router

"""An engine without a model, and the application on it, served from a thread of the test.

What it says depends on prompt, adapter version and completion index alone, one character a token.
"""

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_config import LoaderConfig
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.engines.base import (
    Chunk,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
)
from lorasb_runtime.errors import EngineError
from lorasb_runtime.models.load import load_tokenizer
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.storage.adapter_file import Adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import TargetModule

ALPHABET = "abcdefgé "  # é is two tokens, so that some chunks carry tokens and no text
NATURAL_LENGTH = 40  # characters after which it ends by itself, unless ignore_eos


@dataclass
class FakeEngine:
    """`fail_after` tokens of a completion it raises `error`; `pace` is seconds between tokens.

    It fails only on prompts that start with `fail_on`. Every request that `generate` began is
    open, then finished or aborted; `requests` keeps them all.
    """

    codec: TextCodec
    info: EngineInfo = field(default_factory=lambda: EngineInfo(256, 259, "float32"))
    pace: float = 0.0
    error: Exception | None = None
    fail_after: int = 0
    fail_on: str = ""
    started: bool = False
    open: int = 0
    finished: int = 0
    aborted: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)

    @classmethod
    def of(cls, model: Path) -> "FakeEngine":
        return cls(TextCodec(load_tokenizer(model)))

    def start(self) -> None:
        self.started = True

    def close(self) -> None:
        self.started = False

    def check_health(self) -> None:
        if not self.started:
            raise EngineError("the engine is not running")

    def stats(self) -> EngineStats:
        return EngineStats(self.open, 0, 0, 0, 0, 0, len(self.requests))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        self.open += 1
        whole = False
        try:
            streams = [self._completion(request, index) for index in range(request.n)]
            while streams:
                for stream in list(streams):
                    chunk = next(stream)
                    await asyncio.sleep(self.pace)
                    yield chunk
                    if chunk.finish_reason is not None:
                        streams.remove(stream)
            whole = True
        finally:
            self.open -= 1
            self.finished += whole
            self.aborted += not whole

    def says(self, request: GenerationRequest, index: int) -> str:
        """The text of a completion that nothing stops."""
        version = request.adapter.version if request.adapter else ""
        seed = f"{request.prompt}|{version}|{index}"
        digest = hashlib.sha512(seed.encode()).digest()
        letters = [ALPHABET[byte % len(ALPHABET)] for byte in digest]
        length = NATURAL_LENGTH
        if request.sampling.ignore_eos:
            length = self.info.max_model_len
        return "".join(letters[i % len(letters)] for i in range(length))

    def _completion(self, request: GenerationRequest, index: int) -> Iterator[Chunk]:
        ids = self.codec.encode(self.says(request, index), special_tokens=False)
        room = self.info.max_model_len - len(request.prompt)
        limit = min(room, request.sampling.max_tokens or room)
        tokens = ids[:limit] if len(ids) >= limit else [*ids, self.codec.eos_token_id or 0]
        reason: FinishReason = "length" if len(ids) >= limit else "stop"
        decoder = self.codec.incremental()
        stops = request.sampling.stop
        text, given = "", 0
        for count, token in enumerate(tokens):
            self._maybe_fail(request, count)
            last = count == len(tokens) - 1
            first = count == index == 0
            text += decoder.push(token) + (decoder.flush() if last else "")
            end = min((text.index(stop) for stop in stops if stop in text), default=None)
            if end is not None:
                yield self._chunk(request, index, text[given:end], token, "stop", first)
                return
            safe = len(text) - (0 if last else _begun(text, stops))
            ended = reason if last else None
            yield self._chunk(request, index, text[given:safe], token, ended, first)
            given = max(given, safe)

    def _maybe_fail(self, request: GenerationRequest, count: int) -> None:
        prompt = self.codec.decode(list(request.prompt))
        if self.error and count == self.fail_after and prompt.startswith(self.fail_on):
            raise self.error

    def _chunk(
        self,
        request: GenerationRequest,
        index: int,
        text: str,
        token: int,
        reason: FinishReason | None,
        first: bool,
    ) -> Chunk:
        wanted = request.sampling.logprobs
        logprobs: tuple[TokenLogprob, ...] = ()
        if wanted is not None:
            top = tuple((other, -1.0 - other) for other in range(3, 3 + wanted))
            logprobs = (TokenLogprob(token, -0.5, top),)
        scores: tuple[TokenLogprob, ...] = ()
        count = request.sampling.prompt_logprobs
        if first and count is not None:
            scores = tuple(
                TokenLogprob(prompt, -0.25, ((prompt, -0.25),)[:count])
                for prompt in request.prompt[1:]
            )
        return Chunk(index, text, (token,), logprobs, reason, prompt_logprobs=scores)


def _begun(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of the text may turn out to begin a stop string."""
    starts = (stop[:size] for stop in stops for size in range(1, len(stop)))
    return max((len(start) for start in starts if text.endswith(start)), default=0)


def tiny_basis(seed: int = 0) -> Basis:
    """Random B and A of one target module."""
    generator = torch.Generator().manual_seed(seed)
    target = TargetModule("model.layers.0.self_attn.q_proj", 2, 8, 8)
    tensors = {
        f"{target.module}.A": torch.randn(2, 8, generator=generator),
        f"{target.module}.B": torch.randn(8, 2, generator=generator),
    }
    return Basis((target,), tensors, "lora-sb")


def adapter_bytes(basis: Basis, value: float) -> bytes:
    """An adapter file whose every number is `value`."""
    return serialize_adapter(Adapter(torch.full((basis.size,), value), basis.digest))


def folder_loader(folder: Path, basis: Basis) -> AdapterLoader:
    return AdapterLoader(AdapterStore(str(folder)), basis, LoaderConfig(refresh=0.0))


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The application on a free port of 127.0.0.1; yields its URL once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            assert server.started
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)

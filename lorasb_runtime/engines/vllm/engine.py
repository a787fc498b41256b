"""Our engine on vLLM's AsyncLLM: the same protocol, the work in vLLM's own processes."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input

from lorasb_runtime.engines.base import (
    Chunk,
    EngineInfo,
    EngineStats,
    GenerationRequest,
    check_request,
)
from lorasb_runtime.engines.vllm.gauges import Gauges, SlotReport
from lorasb_runtime.engines.vllm.held_versions import AdapterBringer
from lorasb_runtime.engines.vllm.translate import chunks_of, vllm_sampling
from lorasb_runtime.errors import EngineError, InputError, LorasbError
from lorasb_runtime.models.text import TextCodec

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0


class VllmEngine:
    """Satisfies `engines.base.Engine`. For one event loop, that of its first request.

    `bringer` is None for an engine without a basis, which refuses requests with an adapter.
    """

    def __init__(
        self,
        client: Any,
        codec: TextCodec,
        info: EngineInfo,
        bringer: AdapterBringer | None,
        gauges: Gauges,
    ) -> None:
        """client: vLLM's AsyncLLM."""
        self._client = client
        self._codec = codec
        self._info = info
        self._bringer = bringer
        self._gauges = gauges
        self._open = 0
        self._reporter: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def codec(self) -> TextCodec:
        return self._codec

    def start(self) -> None:
        """Nothing: vLLM's processes have run since the engine was built."""

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.shutdown()
            self._client = self._bringer = None  # or vLLM complains when the interpreter ends

    def stats(self) -> EngineStats:
        return self._gauges.stats()

    def check_health(self) -> None:
        if self._closed or self._client.errored:
            raise EngineError("the engine is not running")

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        check_request(request, self._info, has_basis=self._bringer is not None)
        room = self._info.max_model_len - len(request.prompt)
        params = vllm_sampling(request, room)
        self.check_health()
        self._open += request.n
        try:
            async for chunk in self._run(request, params):
                yield chunk
        except LorasbError:
            raise
        except (VLLMClientError, ValueError) as error:
            raise InputError(str(error)) from None
        except Exception as error:  # vLLM hands on whatever its processes raise
            logger.exception("vLLM failed on request %s", request.request_id)
            raise EngineError("the engine failed on this request") from error
        finally:
            self._open -= request.n

    async def _run(self, request: GenerationRequest, params: Any) -> AsyncIterator[Chunk]:
        lora = None
        if request.adapter is not None:
            assert self._bringer is not None
            lora = await self._bringer.bring(request.adapter)
            self._report_soon()
        prompt = tokens_input(list(request.prompt), cache_salt=request.tenant or None)
        stream = self._client.generate(prompt, params, request.request_id, lora_request=lora)
        first = True
        async with contextlib.aclosing(stream):
            async for output in stream:
                for chunk in chunks_of(output, request, first=first):
                    first = first and chunk.index != 0
                    yield chunk

    def _report_soon(self) -> None:
        """Ask the workers for their slots every second while there are requests, and once more."""
        if self._reporter is None or self._reporter.done():
            self._reporter = asyncio.create_task(self._report())

    async def _report(self) -> None:
        last = False
        while not last and not self._closed:
            last = not self._open
            try:
                reports = await self._client.collective_rpc("lorasb_slots")
            except Exception as error:  # each request that fails says so itself
                logger.warning("no report of the slots: %s", error)
                return
            self._gauges.report = SlotReport(*reports[0])
            if not last:
                await asyncio.sleep(REPORT_SECONDS)

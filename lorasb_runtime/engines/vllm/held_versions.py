"""The front end's side: which adapter versions the workers hold, under which of vLLM's numbers.

Each version has a number of its own, so that a swap is a new adapter to vLLM: its prefix cache
keeps them apart, and a running request ends on the version that it started with.
"""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from vllm.lora.request import LoRARequest

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.engines.vllm.core_message import version_path, write_message
from lorasb_runtime.ops.core_matmul import resident_cores
from lorasb_runtime.storage.basis_file import Basis

HELD_BYTES = 1 << 30
GRACE_SECONDS = 60.0  # a version found for a request is kept so long until vLLM knows the request


@dataclass
class _Entry:
    number: int
    used: float


class HeldVersions:
    """Numbers for versions, the least recently used first. Pure bookkeeping: no calls to vLLM."""

    def __init__(
        self,
        basis: Basis,
        dtype: torch.dtype,
        slots: int,
        in_use: Callable[[], set[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """dtype: of the workers' slots. in_use: numbers that unfinished requests have."""
        self._scaling = basis.scaling
        self._dtype = dtype
        self.capacity = max(2 * slots, HELD_BYTES // (basis.size * dtype.itemsize))
        self._in_use = in_use
        self._clock = clock
        # vLLM holds them in 32 bits. Not from 1 on, where another front end of these workers would
        # start as well.
        self._numbers = count(1 + secrets.randbits(30))
        self._held: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def request(self, adapter: LoadedAdapter) -> LoRARequest | None:
        """How a request names the version; None while the workers do not hold it."""
        entry = self._held.get(adapter.version)
        if entry is None:
            return None
        entry.used = self._clock()
        self._held.move_to_end(adapter.version)
        return self._named(adapter, entry.number, version_path(adapter.version))

    def message(self, adapter: LoadedAdapter) -> LoRARequest:
        """What brings the version's cores to the workers, under a new number."""
        cores = resident_cores(adapter.cores, self._scaling, self._dtype)
        path = write_message(adapter.version, cores)
        return self._named(adapter, next(self._numbers), path)

    def added(self, adapter: LoadedAdapter, number: int) -> None:
        """The workers hold the version now."""
        self._held[adapter.version] = _Entry(number, self._clock())

    def take_surplus(self) -> list[int]:
        """Numbers of versions to take from the workers: the oldest over capacity, in no request."""
        surplus = len(self._held) - self.capacity
        if surplus <= 0:
            return []
        busy, old = self._in_use(), self._clock() - GRACE_SECONDS
        idle = [v for v, e in self._held.items() if e.used < old and e.number not in busy]
        return [self._held.pop(version).number for version in idle[:surplus]]

    def _named(self, adapter: LoadedAdapter, number: int, path: str) -> LoRARequest:
        """vLLM takes requests of one name for the same, so the name has the version in it."""
        name = f"{adapter.name}@{adapter.version}"
        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def adapter_name(lora_name: str) -> str:
    """The adapter's name in the name that `HeldVersions` gave a request."""
    return lora_name.rpartition("@")[0]


def numbers_in_use(client: Any) -> set[int]:
    """The numbers of the unfinished requests of vLLM's AsyncLLM or LLMEngine."""
    states = client.output_processor.request_states.values()
    return {s.lora_request.lora_int_id for s in states if s.lora_request is not None}


class AdapterBringer:
    """Sees to it that the workers of an AsyncLLM hold what a request is about to name."""

    def __init__(self, client: Any, held: HeldVersions) -> None:
        self._client = client
        self._held = held
        self._lock = asyncio.Lock()

    async def bring(self, adapter: LoadedAdapter) -> LoRARequest:
        """The request's name for the version, which the workers hold from now on."""
        request = self._held.request(adapter)
        if request is not None:
            return request
        async with self._lock:  # those who want the same version wait for one message
            request = self._held.request(adapter)
            if request is None:
                message = await asyncio.to_thread(self._held.message, adapter)
                await self._client.add_lora(message)
                self._held.added(adapter, message.lora_int_id)
                request = self._held.request(adapter)
                assert request is not None
                await self._drop(self._client.remove_lora)
        return request

    async def _drop(self, remove: Callable[[int], Awaitable[bool]]) -> None:
        for number in self._held.take_surplus():
            await remove(number)

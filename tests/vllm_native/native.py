"""The engine of these tests, and how to reach its loop."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis

if TYPE_CHECKING:
    from lorasb_runtime.engines.vllm.engine import VllmEngine

T = TypeVar("T")
SLOTS = 33  # 32 adapters and the base
WAIT_SECONDS = 120


@dataclass(frozen=True)
class Native:
    """The engine, and what it serves; `run` gives a coroutine's result from the engine's loop."""

    engine: "VllmEngine"
    model: Path
    basis: Basis
    basis_file: Path
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_SECONDS)


def loaded(adapter: Adapter, name: str = "") -> LoadedAdapter:
    return LoadedAdapter(parse_name(name or adapter.name), adapter.version, adapter.cores)

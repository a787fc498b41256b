"""One engine for all tests of it: vLLM on the pico model in float32, its loop in a thread."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from bases import random_adapter, random_basis
from pico import make_pico

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis

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


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, the smallest that vLLM's attention has on CPU."""
    folder = tmp_path_factory.mktemp("models") / "pico"
    return make_pico("llama", folder, hidden_size=64, head_dim=32, max_position_embeddings=512)


@pytest.fixture(scope="session")
def vllm_basis(vllm_model: Path) -> Basis:
    return random_basis(vllm_model, rank=4, scaling=0.5)


@pytest.fixture(scope="session")
def vllm_basis_file(vllm_basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    save_basis(vllm_basis, path)
    return path


@pytest.fixture(scope="session")
def vllm_adapters(vllm_basis: Basis) -> list[Adapter]:
    return [random_adapter(vllm_basis, i) for i in range(40)]


@pytest.fixture(scope="session")
def native(vllm_model: Path, vllm_basis: Basis, vllm_basis_file: Path) -> Iterator[Native]:
    from lorasb_runtime.engines.vllm.build import load_engine

    config = EngineConfig(
        dtype="float32",
        max_model_len=400,
        slots=SLOTS,
        cache=CacheConfig(64 << 20),
        scheduler=SchedulerConfig(max_num_seqs=40, max_batched_tokens=200),
    )
    engine = load_engine(vllm_model, vllm_basis_file, config, ["enforce-eager"])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield Native(engine, vllm_model, vllm_basis, vllm_basis_file, loop)
    engine.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()

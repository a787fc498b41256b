"""One engine for all tests here: vLLM on the pico model in float32, its loop in a thread."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bases import random_adapter, random_basis
from native import SLOTS, Native
from pico import make_pico

from lorasb_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, the smallest that vLLM's attention has on CPU."""
    folder = tmp_path_factory.mktemp("models") / "pico"
    return make_pico("llama", folder, hidden_size=64, head_dim=32, max_position_embeddings=512)


@pytest.fixture(scope="session")
def vllm_basis(vllm_model: Path) -> Basis:
    return random_basis(vllm_model, rank=4, scaling=0.5)


@pytest.fixture(scope="session")
def basis_file(vllm_basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    save_basis(vllm_basis, path)
    return path


@pytest.fixture(scope="session")
def adapters(vllm_basis: Basis) -> list[Adapter]:
    return [random_adapter(vllm_basis, i) for i in range(40)]


@pytest.fixture(scope="session")
def native(vllm_model: Path, vllm_basis: Basis, basis_file: Path) -> Iterator[Native]:
    from lorasb_runtime.engines.vllm.build import load_engine

    config = EngineConfig(
        dtype="float32",
        max_model_len=400,
        slots=SLOTS,
        cache=CacheConfig(64 << 20),
        scheduler=SchedulerConfig(max_num_seqs=40, max_batched_tokens=200, max_waiting=60),
    )
    engine = load_engine(vllm_model, basis_file, config, ["enforce-eager"])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield Native(engine, vllm_model, vllm_basis, basis_file, loop)
    engine.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()

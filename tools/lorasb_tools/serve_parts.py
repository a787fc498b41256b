"""From settings to what `lorasb serve` serves: the store's loader, the engine, the application."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_config import LoaderConfig
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.adapters.pack_files import PackFiles
from lorasb_runtime.adapters.retry import Retry
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from lorasb_runtime.engines.torch.build import build_engine, load_engine
from lorasb_runtime.engines.torch.prepare import load_model
from lorasb_runtime.errors import NotFoundError
from lorasb_runtime.merging.fold_model import fold_into_model
from lorasb_runtime.models.load import load_tokenizer, parse_device, parse_dtype
from lorasb_runtime.models.locate import locate_model, model_name
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.ops.threads import use_all_cores
from lorasb_runtime.storage.basis_file import load_basis
from lorasb_runtime.storage.checkpoint import open_checkpoint
from lorasb_runtime.storage.match import check_model
from lorasb_server.app import create_app
from lorasb_server.lifecycle import Lifecycle
from lorasb_server.settings import ServerConfig, Settings
from lorasb_server.tenants.key_ring import KeyRing
from lorasb_tools.serve_vllm import vllm_engine

if TYPE_CHECKING:
    from lorasb_runtime.engines.base import Engine
    from lorasb_runtime.engines.torch.engine import TorchEngine

logger = logging.getLogger(__name__)

MEMORY_STORE = "memory://lorasb"
DISK_CACHE_GIB = 4.0


def load_app(
    settings: Settings,
    pins: frozenset[AdapterName],
    keys: KeyRing | None,
    lifecycle: Lifecycle,
) -> Any:
    """The application, with model, basis and pinned adapters loaded; takes its time.

    Raises InputError for files and settings that cannot be served.
    """
    assert settings.model is not None
    torch.set_num_threads(1)  # in all threads but this one, which ends, and the engine's
    use_all_cores()
    logger.info("lorasb: loading %s", settings.model)
    folder = locate_model(settings.model)
    loader = _open_loader(folder, settings, pins)
    config = _engine_config(settings, pins)
    engine: Engine
    if settings.engine == "vllm":
        engine = vllm_engine(folder, settings.basis, config, settings.vllm_arg)
    elif settings.merged is not None:
        assert loader is not None
        engine = _merged_engine(folder, loader, settings.merged, config)
        loader = None
    else:
        engine = _engine(folder, loader, config)
    server = _server_config(settings, settings.model)
    return create_app(engine, loader, server, keys, lifecycle, _traces(settings))


def _server_config(settings: Settings, model: str) -> ServerConfig:
    own = settings.merged or settings.served_model_name
    return ServerConfig(
        model_name=own or model_name(model),
        model_aliases=() if own else (model,),
        created=int(time.time()),
        max_queue=settings.max_queue,
        request_timeout=settings.request_timeout,
    )


def _traces(settings: Settings) -> Any:
    if settings.otlp_endpoint is None:
        return None
    from lorasb_server.traces import Traces

    return Traces(settings.otlp_endpoint)


def _engine_config(settings: Settings, pins: frozenset[AdapterName]) -> EngineConfig:
    cache = CacheConfig(
        nbytes=_bytes(settings.kv_cache_gib), prefix_nbytes=_bytes(settings.prefix_cache_gib)
    )
    return EngineConfig(
        dtype=settings.dtype,
        device=settings.device,
        max_model_len=settings.max_model_len,
        slots=settings.slots,
        pins=frozenset(map(str, pins)),
        cache=cache,
        scheduler=SchedulerConfig(settings.max_num_seqs, settings.max_batched_tokens),
    )


def _open_loader(
    folder: Path, settings: Settings, pins: frozenset[AdapterName]
) -> AdapterLoader | None:
    if settings.basis is None:
        return None
    adapters, pack = settings.adapters, settings.pack
    if adapters is None and pack is not None:
        logger.info("no --adapters; the adapters are those of %s, and cannot be changed", pack)
        adapters, pack = str(pack), None
    elif adapters is None:
        logger.info("no --adapters; adapters put here live in memory and end with the server")
        adapters = MEMORY_STORE
    config = LoaderConfig(
        refresh=settings.refresh,
        stale=settings.stale,
        timeout=settings.store_timeout,
        disk_cache=settings.disk_cache,
        pins=pins,
        disk_cache_bytes=_bytes(settings.disk_cache_gib or DISK_CACHE_GIB),
    )
    basis = load_basis(settings.basis)
    check_model(basis, open_checkpoint(folder), str(settings.basis))
    retry = Retry(config.retry_config())
    store = AdapterStore(adapters, retry)
    packed = PackFiles(str(pack), retry) if pack is not None else None
    return AdapterLoader(store, basis, config, pack=packed)


def _engine(folder: Path, loader: AdapterLoader | None, config: EngineConfig) -> "TorchEngine":
    if loader is None:
        return load_engine(folder, None, config)
    engine = load_engine(folder, loader.basis, config)
    for name in sorted(loader.config.pins):
        try:
            engine.warm(loader.get(name))
        except NotFoundError:
            logger.warning("--pin %s: not in the store yet; pinned from its first request on", name)
    return engine


def _merged_engine(
    folder: Path, loader: AdapterLoader, name: str, config: EngineConfig
) -> "TorchEngine":
    cores = scale_core(loader.get(parse_name(name)).cores, loader.basis.scaling)
    dtype = parse_dtype(config.dtype) if config.dtype else None
    model = load_model(
        folder,
        dtype,
        parse_device(config.device),
        lambda loaded: fold_into_model(loaded, loader.basis, cores),
    )
    return build_engine(model, TextCodec(load_tokenizer(folder)), None, config)


def _bytes(gib: float) -> int:
    return int(gib * (1 << 30))

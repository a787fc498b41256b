"""The FastAPI application, put together from its routes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from fastapi import FastAPI

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.engines.base import Engine
from lorasb_runtime.models.load import parse_dtype
from lorasb_runtime.storage.adapter_file import max_file_bytes
from lorasb_server.adapters import adapter_routes
from lorasb_server.admission import Admission
from lorasb_server.auth import Auth
from lorasb_server.blender import Blender, encoded_length
from lorasb_server.chat import chat_routes
from lorasb_server.completions import completion_routes
from lorasb_server.errors import install_handlers
from lorasb_server.exchanges import Exchanges
from lorasb_server.lifecycle import Lifecycle
from lorasb_server.limits import SizeLimit
from lorasb_server.metrics import Metrics
from lorasb_server.models import model_routes
from lorasb_server.operations import operation_routes
from lorasb_server.playground.routes import playground_routes
from lorasb_server.responses import response_routes
from lorasb_server.service import Service
from lorasb_server.settings import ServerConfig
from lorasb_server.tenants.key_ring import KeyRing
from lorasb_server.tenants.meter import Meter
from lorasb_server.tokens import token_routes

if TYPE_CHECKING:
    from lorasb_server.traces import Traces

PROMPT_ROOM = 1 << 20  # bytes of a body besides its inline adapter


def create_app(
    engine: Engine,
    loader: AdapterLoader | None,
    config: ServerConfig,
    keys: KeyRing | None = None,
    lifecycle: Lifecycle | None = None,
    traces: "Traces | None" = None,
) -> FastAPI:
    """The application; its lifespan starts and closes the engine, and closes loader and traces.

    `loader` is None for a server without a basis. Without `keys` everyone is admin.
    """
    lifecycle = lifecycle or Lifecycle()
    service = _service(engine, loader, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        lifecycle.loaded()
        try:
            async with keys.watched() if keys else nullcontext():
                yield
        finally:
            lifecycle.stop()
            engine.close()
            if loader is not None:
                loader.close()
            if traces is not None:
                await asyncio.to_thread(traces.close)

    app = FastAPI(title="lorasb", lifespan=lifespan)
    install_handlers(app)
    app.add_middleware(SizeLimit, max_bytes=_largest_body(loader, config))
    app.add_middleware(Auth, keys=keys, meter=service.meter)
    app.add_middleware(Exchanges, lifecycle=lifecycle, metrics=service.metrics, traces=traces)
    for routes in (
        chat_routes,
        completion_routes,
        response_routes,
        model_routes,
        adapter_routes,
        token_routes,
    ):
        app.include_router(routes(service))
    app.include_router(operation_routes(service, lifecycle))
    app.include_router(playground_routes())
    return app


def _service(engine: Engine, loader: AdapterLoader | None, config: ServerConfig) -> Service:
    return Service(
        engine,
        loader,
        config,
        Metrics(engine, loader),
        _blender(engine, loader, config),
        Meter(),
        Admission(engine.info.max_num_seqs, config.max_queue),
    )


def _blender(engine: Engine, loader: AdapterLoader | None, config: ServerConfig) -> Blender | None:
    if loader is None:
        return None
    cache = MemoryCache(config.blend_cache_bytes, config.blend_cache_count)
    return Blender(loader.basis, parse_dtype(engine.info.core_dtype), cache)


def _largest_body(loader: AdapterLoader | None, config: ServerConfig) -> int:
    if loader is None:
        return config.max_request_bytes
    inline = encoded_length(max_file_bytes(loader.basis))
    return max(config.max_request_bytes, inline + PROMPT_ROOM)

"""The FastAPI application, put together from its routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.engines.base import Engine
from lorasb_runtime.models.load import parse_dtype
from lorasb_runtime.storage.adapter_file import max_file_bytes
from lorasb_server.adapters import adapter_routes
from lorasb_server.auth import Admin, Auth
from lorasb_server.blender import Blender, encoded_length
from lorasb_server.chat import chat_routes
from lorasb_server.completions import completion_routes
from lorasb_server.documented import READINESS, failures
from lorasb_server.errors import install_handlers
from lorasb_server.limits import RequestLog, SizeLimit
from lorasb_server.metrics import Metrics
from lorasb_server.models import model_routes
from lorasb_server.playground.routes import playground_routes
from lorasb_server.responses import response_routes
from lorasb_server.schemas.answers import Status
from lorasb_server.service import Service
from lorasb_server.settings import ServerConfig
from lorasb_server.tenants.key_ring import KeyRing
from lorasb_server.tenants.meter import Meter
from lorasb_server.tokens import token_routes

PROMPT_ROOM = 1 << 20  # bytes of a body besides its inline adapter
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    engine: Engine,
    loader: AdapterLoader | None,
    config: ServerConfig,
    keys: KeyRing | None = None,
) -> FastAPI:
    """The application; its lifespan starts and closes the engine.

    `loader` is None for a server without a basis. Without `keys` everyone is admin.
    """
    blender = _blender(engine, loader, config)
    service = Service(engine, loader, config, Metrics(engine, loader), blender, Meter())
    ready = False

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal ready
        engine.start()
        ready = True
        try:
            async with keys.watched() if keys else nullcontext():
                yield
        finally:
            ready = False
            engine.close()
            if loader is not None:
                loader.close()

    app = FastAPI(title="lorasb", lifespan=lifespan)
    install_handlers(app)
    app.add_middleware(SizeLimit, max_bytes=_largest_body(loader, config))
    app.add_middleware(Auth, keys=keys, meter=service.meter)
    app.add_middleware(RequestLog, metrics=service.metrics)
    for routes in (
        chat_routes,
        completion_routes,
        response_routes,
        model_routes,
        adapter_routes,
        token_routes,
    ):
        app.include_router(routes(service))
    app.include_router(playground_routes())

    @app.get("/health", response_model=Status, tags=["operations"])
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", tags=["operations"], response_model=Status, responses=READINESS)
    async def is_ready() -> Response:
        body = {"status": "ready" if ready else "loading"}
        return JSONResponse(body, 200 if ready else 503)

    @app.get(
        "/metrics",
        tags=["operations"],
        response_class=PlainTextResponse,
        responses=failures(401, 403),
    )
    async def metrics(_: Admin) -> Response:
        return Response(service.metrics.render(), media_type=METRICS_TYPE)

    return app


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

"""What is asked by machines that run the server: /health, /ready and /metrics."""

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from lorasb_runtime.errors import EngineError
from lorasb_server.auth import Admin
from lorasb_server.documented import READINESS, failures
from lorasb_server.lifecycle import Lifecycle
from lorasb_server.probes import METRICS, status_response
from lorasb_server.schemas.answers import Status
from lorasb_server.service import Service

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAILED = "failed"


def operation_routes(service: Service, lifecycle: Lifecycle) -> APIRouter:
    router = APIRouter(tags=["operations"])

    def failed() -> bool:
        try:
            service.engine.check_health()
        except EngineError:
            return True
        return False

    @router.get("/health", response_model=Status, responses=READINESS)
    async def health() -> Response:
        return status_response(FAILED if failed() else "alive")

    @router.get("/ready", response_model=Status, responses=READINESS)
    async def is_ready() -> Response:
        return status_response(FAILED if failed() else lifecycle.phase)

    @router.get(METRICS, response_class=PlainTextResponse, responses=failures(401, 403))
    async def metrics(_: Admin) -> Response:
        return Response(service.metrics.render(), media_type=METRICS_TYPE)

    return router

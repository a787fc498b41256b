"""GET /v1/models: the base model first, then the adapters that the store has."""

from typing import Any

from fastapi import APIRouter

from lorasb_server.auth import AnyCaller
from lorasb_server.documented import failures
from lorasb_server.errors import ModelNotFoundError
from lorasb_server.schemas.answers import ModelCard, ModelList
from lorasb_server.service import Service


def model_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["models"])
    config = service.config

    def card(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": config.created,
            "owned_by": "lorasb",
            "root": config.model_name,
            "parent": parent,
            "max_model_len": service.engine.info.max_model_len,
        }

    @router.get("/v1/models", response_model=ModelList, responses=failures(401, 503))
    async def list_models(caller: AnyCaller) -> dict[str, Any]:
        cards = [card(config.model_name, None)]
        if service.loader is not None:
            names = [caller.shown(name) for name in await service.names(caller)]
            cards += [card(name, config.model_name) for name in names if not config.is_base(name)]
        return {"object": "list", "data": cards}

    @router.get(
        "/v1/models/{name:path}",
        response_model=ModelCard,
        responses=failures(401, 404, 503),
    )
    async def get_model(name: str, caller: AnyCaller) -> dict[str, Any]:
        if config.is_base(name):
            return card(config.model_name, None)
        adapter = await service.resolve(caller, name, None)
        if adapter is None:
            raise ModelNotFoundError("model", name)
        return card(caller.shown(adapter.name), config.model_name)

    return router

"""GET /v1/models: the base model first, then the adapters that the store has."""

from typing import Any

from fastapi import APIRouter

from lorasb_server.errors import ModelNotFoundError
from lorasb_server.service import Service, from_store


def model_routes(service: Service) -> APIRouter:
    router = APIRouter()
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

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        cards = [card(config.model_name, None)]
        loader = service.loader
        if loader is not None and loader.store.files.listable:
            names = await from_store(loader, loader.store.names)
            cards += [card(str(n), config.model_name) for n in names if not config.is_base(str(n))]
        return {"object": "list", "data": cards}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        if config.is_base(name):
            return card(config.model_name, None)
        adapter = await service.resolve(name, None)
        if adapter is None:
            raise ModelNotFoundError("model", name)
        return card(str(adapter.name), config.model_name)

    return router

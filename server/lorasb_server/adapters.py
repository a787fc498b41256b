"""/v1/adapters: list, look at, publish, delete and roll back adapters."""

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Request

from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.adapters.store import AdapterStore, StoredVersion
from lorasb_runtime.errors import (
    ConflictError,
    FileFormatError,
    NotFoundError,
    TooLargeError,
)
from lorasb_runtime.storage.adapter_file import max_file_bytes, parse_adapter
from lorasb_server.schemas.strict import Strict
from lorasb_server.service import Service, from_store

logger = logging.getLogger(__name__)


class RollbackRequest(Strict):
    """Without a version: the newest one stored before the current."""

    version: str | None = None


def adapter_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters")

    @router.get("")
    async def list_adapters() -> dict[str, Any]:
        loader = service.need_loader()
        data = await from_store(_cards, loader.store)
        return {"object": "list", "basis": loader.basis.digest, "data": data}

    @router.get("/{name:path}/versions")
    async def list_versions(name: str) -> dict[str, Any]:
        store = service.need_loader().store
        versions = await from_store(store.versions, parse_name(name))
        return {"object": "list", "data": [_version(v) for v in versions]}

    @router.post("/{name:path}/rollback")
    async def roll_back(name: str, body: RollbackRequest | None = None) -> dict[str, Any]:
        loader = service.need_loader()
        version = body.version if body else None
        loaded = await from_store(loader.rollback, parse_name(name), version)
        return {"name": str(loaded.name), "version": loaded.version}

    @router.get("/{name:path}")
    async def get_adapter(name: str) -> dict[str, Any]:
        store = service.need_loader().store
        target = parse_name(name)
        card = await from_store(_card, store, target)
        return {**card, "basis": await from_store(_basis, store, target, card["version"])}

    @router.put("/{name:path}")
    async def put_adapter(name: str, request: Request) -> dict[str, Any]:
        return await _publish(service, parse_name(name), request)

    @router.delete("/{name:path}")
    async def delete_adapter(name: str) -> dict[str, Any]:
        target = parse_name(name)
        await from_store(service.need_loader().delete, target)
        return {"name": str(target), "deleted": True}

    return router


async def _publish(service: Service, target: AdapterName, request: Request) -> dict[str, Any]:
    """Store the request's body as the adapter's current version."""
    loader = service.need_loader()
    if service.config.is_base(str(target)):
        raise ConflictError(f"{target}: this name is the base model's")
    data = await _read_body(request, max_file_bytes(loader.basis))
    previous = await asyncio.to_thread(_current, loader.store, target)
    loaded = await asyncio.to_thread(loader.publish, target, data)
    return {
        "name": str(target),
        "version": loaded.version,
        "previous": previous,
        "basis": loader.basis.digest,
        "bytes": len(data),
    }


async def _read_body(request: Request, limit: int) -> bytes:
    """The body's bytes. Raises TooLargeError as soon as it is known to exceed `limit`."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise TooLargeError(f"adapter too large: found {announced} bytes, at most {limit} fit")
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise TooLargeError(f"adapter too large: found over {limit} bytes, which is the most")
    return bytes(data)


def _current(store: AdapterStore, name: AdapterName) -> str | None:
    """The version that is served; None for a new name or a damaged one, which a PUT repairs."""
    try:
        return store.current(name)
    except NotFoundError:
        return None
    except FileFormatError as error:
        logger.warning("%s", error)
        return None


def _cards(store: AdapterStore) -> list[dict[str, Any]]:
    """All adapters; one that is damaged or just being deleted does not hide the others."""
    cards = []
    for name in store.names():
        try:
            cards.append(_card(store, name))
        except (NotFoundError, FileFormatError) as error:
            logger.warning("not listed: %s", error)
    return cards


def _basis(store: AdapterStore, name: AdapterName, version: str) -> str:
    """The digest of the basis that the stored file was made for, whichever this server has."""
    return parse_adapter(store.fetch(name, version), f"adapter {str(name)!r}").basis


def _card(store: AdapterStore, name: AdapterName) -> dict[str, Any]:
    versions = store.versions(name)
    current = next((v for v in versions if v.current), None)
    if current is None:
        raise NotFoundError(f"adapter {str(name)!r}: its current version is not in the store")
    return {"name": str(name), "versions": len(versions), **_version(current)}


def _version(version: StoredVersion) -> dict[str, Any]:
    return {
        "version": version.version,
        "bytes": version.nbytes,
        "modified": version.modified.isoformat() if version.modified else None,
        "current": version.current,
    }

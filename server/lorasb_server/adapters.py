"""/v1/adapters: list, look at, publish, delete and roll back adapters."""

import logging
from typing import Any

from fastapi import APIRouter, Request

from lorasb_runtime.adapters.catalog import CatalogEntry, describe, list_adapters
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.adapters.store import AdapterStore, StoredVersion
from lorasb_runtime.errors import (
    ConflictError,
    FileFormatError,
    NotFoundError,
    TooLargeError,
)
from lorasb_server.schemas.sampling import Strict
from lorasb_server.service import Service, from_store

logger = logging.getLogger(__name__)

HEADER_ALLOWANCE = 1 << 20  # bytes of an adapter file besides its numbers


class RollbackRequest(Strict):
    """Without a version: the newest one stored before the current."""

    version: str | None = None


def adapter_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters")

    @router.get("")
    async def list_adapters() -> dict[str, Any]:
        loader = service.need_loader()
        data = await from_store(loader, _cards, loader.store)
        return {"object": "list", "basis": loader.basis.digest, "data": data}

    @router.get("/{name:path}/versions")
    async def list_versions(name: str) -> dict[str, Any]:
        loader = service.need_loader()
        versions = await from_store(loader, loader.store.versions, parse_name(name))
        return {"object": "list", "data": [_version(v) for v in versions]}

    @router.post("/{name:path}/rollback")
    async def roll_back(name: str, body: RollbackRequest | None = None) -> dict[str, Any]:
        loader = service.need_loader()
        version = body.version if body else None
        loaded = await from_store(loader, loader.rollback, parse_name(name), version)
        return {"name": str(loaded.name), "version": loaded.version}

    @router.get("/{name:path}")
    async def get_adapter(name: str) -> dict[str, Any]:
        loader = service.need_loader()
        return await from_store(loader, _described, loader.store, parse_name(name))

    @router.put("/{name:path}")
    async def put_adapter(name: str, request: Request) -> dict[str, Any]:
        return await _publish(service, parse_name(name), request)

    @router.delete("/{name:path}")
    async def delete_adapter(name: str) -> dict[str, Any]:
        target = parse_name(name)
        loader = service.need_loader()
        await from_store(loader, loader.delete, target)
        return {"name": str(target), "deleted": True}

    return router


async def _publish(service: Service, target: AdapterName, request: Request) -> dict[str, Any]:
    """Store the request's body as the adapter's current version."""
    loader = service.need_loader()
    if service.config.is_base(str(target)):
        raise ConflictError(f"{target}: this name is the base model's")
    data = await _read_body(request, 4 * loader.basis.size + HEADER_ALLOWANCE)
    previous = await loader.workers.call(_current, loader.store, target)
    loaded = await loader.workers.call(loader.publish, target, data)
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
    for entry in list_adapters(store):
        if entry.problem is None:
            cards.append(_card(entry))
        else:
            logger.warning("not listed: %s", entry.problem)
    return cards


def _described(store: AdapterStore, name: AdapterName) -> dict[str, Any]:
    """One adapter, with the digest of the basis it was made for, whichever this server has."""
    entry = describe(store, name)
    return {**_card(entry), "basis": entry.basis}


def _card(entry: CatalogEntry) -> dict[str, Any]:
    return {
        "name": str(entry.name),
        "versions": entry.versions,
        "version": entry.version,
        "bytes": entry.nbytes,
        "modified": entry.modified.isoformat() if entry.modified else None,
        "current": True,
    }


def _version(version: StoredVersion) -> dict[str, Any]:
    return {
        "version": version.version,
        "bytes": version.nbytes,
        "modified": version.modified.isoformat() if version.modified else None,
        "current": version.current,
    }

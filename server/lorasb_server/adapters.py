"""/v1/adapters: list, look at, publish, delete and roll back adapters."""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from lorasb_runtime.adapters import catalog
from lorasb_runtime.adapters.catalog import CatalogEntry
from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.store import AdapterStore, StoredVersion
from lorasb_runtime.errors import (
    ConflictError,
    FileFormatError,
    NotFoundError,
    TooLargeError,
)
from lorasb_runtime.storage.adapter_file import max_file_bytes
from lorasb_server.auth import AnyCaller, Publisher
from lorasb_server.documented import PUT_FILE, failures
from lorasb_server.schemas.answers import (
    AdapterList,
    AdapterVersions,
    AdapterWithBasis,
    Deleted,
    Published,
    RolledBack,
)
from lorasb_server.schemas.strict import Strict
from lorasb_server.service import Service, from_store
from lorasb_server.tenants.caller import Caller
from lorasb_server.tenants.errors import AdapterNotFoundError
from lorasb_server.tenants.meter import check_adapters

logger = logging.getLogger(__name__)


class RollbackRequest(Strict):
    """Without a version: the newest one stored before the current."""

    version: str | None = None


def adapter_routes(service: Service) -> APIRouter:
    router = APIRouter(
        prefix="/v1/adapters", tags=["adapters"], responses=failures(401, 403, 404, 503)
    )

    @router.get("", response_model=AdapterList)
    async def list_adapters(caller: AnyCaller) -> dict[str, Any]:
        loader = service.need_loader()
        read = partial(catalog.list_adapters, loader.store)
        data = _cards(caller, await service.list_for(caller, read))
        return {"object": "list", "basis": loader.basis.digest, "data": data}

    @router.get("/{name:path}/versions", response_model=AdapterVersions)
    async def list_versions(name: str, caller: AnyCaller) -> dict[str, Any]:
        loader = service.need_loader()
        with _as_missing(name):
            versions = await from_store(loader, loader.store.versions, caller.readable(name))
        return {"object": "list", "data": [_version(v) for v in versions]}

    @router.post(
        "/{name:path}/rollback", response_model=RolledBack, responses=failures(400, 409, 413)
    )
    async def roll_back(
        name: str, caller: Publisher, body: RollbackRequest | None = None
    ) -> dict[str, Any]:
        loader = service.need_loader()
        target = caller.writable(name)
        await loader.workers.call(_need, loader.store, target, name)
        loaded = await from_store(loader, loader.rollback, target, body.version if body else None)
        return {"name": caller.shown(loaded.name), "version": loaded.version}

    @router.get("/{name:path}", response_model=AdapterWithBasis)
    async def get_adapter(name: str, caller: AnyCaller) -> dict[str, Any]:
        loader = service.need_loader()
        target = caller.readable(name)
        with _as_missing(name):
            entry = await from_store(loader, catalog.describe, loader.store, target)
        return {**_card(caller, entry), "basis": entry.basis}

    @router.put(
        "/{name:path}",
        response_model=Published,
        responses=failures(400, 409, 413, 422, 429),
        openapi_extra=PUT_FILE,
    )
    async def put_adapter(name: str, request: Request, caller: Publisher) -> dict[str, Any]:
        service.need_loader()
        return await _publish(service, caller, caller.writable(name), request)

    @router.delete("/{name:path}", response_model=Deleted, responses=failures(409))
    async def delete_adapter(name: str, caller: Publisher) -> dict[str, Any]:
        loader = service.need_loader()
        target = caller.writable(name)
        with _as_missing(name):
            await from_store(loader, loader.delete, target)
        return {"name": caller.shown(target), "deleted": True}

    return router


async def _publish(
    service: Service, caller: Caller, target: AdapterName, request: Request
) -> dict[str, Any]:
    """Store the request's body as the adapter's current version."""
    loader = service.need_loader()
    shown = caller.shown(target)
    if service.config.is_base(str(target)) or service.config.is_base(shown):
        raise ConflictError(f"{shown}: this name is the base model's")
    data = await _read_body(request, max_file_bytes(loader.basis))

    def swap() -> tuple[str | None, LoadedAdapter]:
        return _current(loader.store, target), loader.publish(target, data)

    async with _room(service, caller, target):
        previous, loaded = await loader.workers.call(swap)
    return {
        "name": shown,
        "version": loaded.version,
        "previous": previous,
        "basis": loader.basis.digest,
        "bytes": len(data),
    }


@asynccontextmanager
async def _room(service: Service, caller: Caller, target: AdapterName) -> AsyncIterator[None]:
    """Room for one more name in the caller's own namespace, kept until the block has ended."""
    if caller.quota.adapters is None or target.namespace != caller.tenant:
        yield
        return
    async with service.meter.publishing(caller.tenant):
        loader = service.need_loader()
        names = await from_store(loader, loader.store.names, target.namespace)
        if target not in names:
            check_adapters(len(names), caller.quota)
        yield


@contextmanager
def _as_missing(text: str) -> Iterator[None]:
    """A missing adapter is answered for exactly as one that the caller may not see."""
    try:
        yield
    except NotFoundError:
        raise AdapterNotFoundError(text) from None


def _need(store: AdapterStore, name: AdapterName, text: str) -> None:
    """Raises AdapterNotFoundError where the store has no such adapter; a damaged one is one."""
    try:
        store.current(name)
    except NotFoundError:
        raise AdapterNotFoundError(text) from None
    except FileFormatError as error:
        logger.warning("%s", error)


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


def _cards(caller: Caller, entries: list[CatalogEntry]) -> list[dict[str, Any]]:
    """One that is damaged or just being deleted does not hide the others."""
    cards = []
    for entry in entries:
        if entry.problem is None:
            cards.append(_card(caller, entry))
        else:
            logger.warning("not listed: %s", entry.problem)
    return cards


def _card(caller: Caller, entry: CatalogEntry) -> dict[str, Any]:
    return {
        "name": caller.shown(entry.name),
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

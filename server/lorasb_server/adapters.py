"""/v1/adapters: list, look at, publish, delete and roll back adapters."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fastapi import APIRouter, Request

from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.store import AdapterStore, StoredVersion
from lorasb_runtime.errors import (
    ConflictError,
    FileFormatError,
    NotFoundError,
    TooLargeError,
)
from lorasb_runtime.storage.adapter_file import parse_adapter
from lorasb_server.auth import AnyCaller, Publisher
from lorasb_server.schemas.sampling import Strict
from lorasb_server.service import Service, from_store
from lorasb_server.tenants.caller import Caller
from lorasb_server.tenants.errors import AdapterNotFoundError
from lorasb_server.tenants.meter import check_adapters

logger = logging.getLogger(__name__)

HEADER_ALLOWANCE = 1 << 20  # bytes of an adapter file besides its numbers


class RollbackRequest(Strict):
    """Without a version: the newest one stored before the current."""

    version: str | None = None


def adapter_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters")

    @router.get("")
    async def list_adapters(caller: AnyCaller) -> dict[str, Any]:
        loader = service.need_loader()
        names = await service.names(caller)
        data = await from_store(_cards, loader.store, caller, names)
        return {"object": "list", "basis": loader.basis.digest, "data": data}

    @router.get("/{name:path}/versions")
    async def list_versions(name: str, caller: AnyCaller) -> dict[str, Any]:
        store = service.need_loader().store
        with _as_missing(name):
            versions = await from_store(store.versions, caller.readable(name))
        return {"object": "list", "data": [_version(v) for v in versions]}

    @router.post("/{name:path}/rollback")
    async def roll_back(
        name: str, caller: Publisher, body: RollbackRequest | None = None
    ) -> dict[str, Any]:
        loader = service.need_loader()
        target = caller.writable(name)
        await asyncio.to_thread(_need, loader.store, target, name)
        loaded = await from_store(loader.rollback, target, body.version if body else None)
        return {"name": caller.shown(loaded.name), "version": loaded.version}

    @router.get("/{name:path}")
    async def get_adapter(name: str, caller: AnyCaller) -> dict[str, Any]:
        store = service.need_loader().store
        target = caller.readable(name)
        with _as_missing(name):
            card = await from_store(_card, store, caller, target)
        return {**card, "basis": await from_store(_basis, store, target, card["version"])}

    @router.put("/{name:path}")
    async def put_adapter(name: str, request: Request, caller: Publisher) -> dict[str, Any]:
        service.need_loader()
        return await _publish(service, caller, caller.writable(name), request)

    @router.delete("/{name:path}")
    async def delete_adapter(name: str, caller: Publisher) -> dict[str, Any]:
        loader = service.need_loader()
        target = caller.writable(name)
        with _as_missing(name):
            await from_store(loader.delete, target)
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
    data = await _read_body(request, 4 * loader.basis.size + HEADER_ALLOWANCE)
    async with _room(service, caller, target):
        previous = await asyncio.to_thread(_current, loader.store, target)
        loaded = await asyncio.to_thread(loader.publish, target, data)
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
        names = await from_store(service.need_loader().store.names, target.namespace)
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


def _cards(store: AdapterStore, caller: Caller, names: list[AdapterName]) -> list[dict[str, Any]]:
    """One that is damaged or just being deleted does not hide the others."""
    cards = []
    for name in names:
        try:
            cards.append(_card(store, caller, name))
        except (NotFoundError, FileFormatError) as error:
            logger.warning("not listed: %s", error)
    return cards


def _basis(store: AdapterStore, name: AdapterName, version: str) -> str:
    """The digest of the basis that the stored file was made for, whichever this server has."""
    return parse_adapter(store.fetch(name, version), f"adapter {str(name)!r}").basis


def _card(store: AdapterStore, caller: Caller, name: AdapterName) -> dict[str, Any]:
    versions = store.versions(name)
    current = next((v for v in versions if v.current), None)
    if current is None:
        raise NotFoundError(f"adapter {str(name)!r}: its current version is not in the store")
    return {"name": caller.shown(name), "versions": len(versions), **_version(current)}


def _version(version: StoredVersion) -> dict[str, Any]:
    return {
        "version": version.version,
        "bytes": version.nbytes,
        "modified": version.modified.isoformat() if version.modified else None,
        "current": version.current,
    }

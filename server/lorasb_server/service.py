"""What every route works with: the engine, the adapters, and who is meant by a model's name."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from fastapi import Request

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.engines.base import Engine
from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError, StoreError
from lorasb_server.admission import Admission
from lorasb_server.blender import Blender
from lorasb_server.errors import FieldError, ModelNotFoundError
from lorasb_server.exchange import Exchange, allowed_seconds, exchange_of
from lorasb_server.metrics import Metrics
from lorasb_server.schemas.adapter import AdapterField, BlendPart, InlineAdapter
from lorasb_server.settings import ServerConfig
from lorasb_server.tenants.caller import Caller
from lorasb_server.tenants.meter import Meter

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """`loader` and `blender` are None for a server without a basis, which has no adapters."""

    engine: Engine
    loader: AdapterLoader | None
    config: ServerConfig
    metrics: Metrics
    blender: Blender | None
    meter: Meter
    admission: Admission

    async def answer(
        self,
        request: Request,
        sequences: int,
        work: Callable[[Exchange], Coroutine[Any, Any, T]],
    ) -> T:
        """What `work` gives, if there are places for so many sequences and it is done in time.

        Raises QueueFullError before any work, and what `Exchange.run` raises.
        """
        exchange = exchange_of(request)
        seconds = allowed_seconds(request.headers, self.config.request_timeout)
        exchange.places = self.admission.enter(sequences)
        exchange.held.callback(exchange.places.close)
        if seconds is not None:
            exchange.expire(seconds)
        return await exchange.run(request, work(exchange))

    async def resolve(
        self, caller: Caller, model: str, adapter: AdapterField | None
    ) -> LoadedAdapter | None:
        """The adapter that a request of this caller means, None for the base model.

        Raises ModelNotFoundError for a name that nothing answers to, FieldError when both fields
        name an adapter, StoreError when the store fails or holds a damaged file.
        """
        if self.config.is_base(model):
            return None if adapter is None else await self._adapter(caller, adapter)
        if adapter is not None:
            raise FieldError(
                "adapter", "adapter: the model field names an adapter already; give one of them"
            )
        return await self._load(caller, "model", model)

    async def _adapter(self, caller: Caller, field: AdapterField) -> LoadedAdapter | None:
        match field:
            case str():
                return await self._load(caller, "adapter", field)
            case InlineAdapter():
                return await asyncio.to_thread(self._need_blender().inline, field.inline)
            case _:
                return await self._blend(caller, field)

    async def _blend(self, caller: Caller, parts: list[BlendPart]) -> LoadedAdapter | None:
        """Every part is looked up, and the first that cannot be had is the one refused."""
        loads = (self._load(caller, f"adapter.{i}.name", part.name) for i, part in enumerate(parts))
        found = []
        for result in await asyncio.gather(*loads, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            found.append(result)
        weights = (part.weight for part in parts)
        weighted = list(zip(found, weights, strict=True))
        return await asyncio.to_thread(self._need_blender().blend, weighted)

    def _need_blender(self) -> Blender:
        self.need_loader()
        assert self.blender is not None
        return self.blender

    def need_loader(self) -> AdapterLoader:
        if self.loader is None:
            raise NotFoundError("this server has no basis, so it has no adapters")
        return self.loader

    async def names(self, caller: Caller) -> list[AdapterName]:
        """The adapters that the store has for this caller; none where it cannot be listed."""
        store = self.need_loader().store
        return await self.list_for(caller, store.names) if store.files.listable else []

    async def list_for(self, caller: Caller, read: Callable[[str | None], list[T]]) -> list[T]:
        """What `read` lists of each namespace that the caller may read; others are not looked at.

        `read` is given None for all of them.
        """
        loader = self.need_loader()
        if caller.namespaces is None:
            return await from_store(loader, read, None)
        found = [await from_store(loader, read, namespace) for namespace in caller.namespaces]
        return [item for items in found for item in items]

    async def _load(self, caller: Caller, param: str, text: str) -> LoadedAdapter:
        if self.loader is None:
            raise ModelNotFoundError(param, text)
        try:
            name: AdapterName = caller.readable(text)
        except InputError:
            raise ModelNotFoundError(param, text) from None
        try:
            return await load_adapter(self.loader, name)
        except NotFoundError:
            raise ModelNotFoundError(param, text) from None


async def load_adapter(loader: AdapterLoader, name: AdapterName) -> LoadedAdapter:
    """The adapter's current version; a damaged file in the store is StoreError."""
    try:
        return await loader.load(name)
    except FileFormatError as error:
        raise StoreError(str(error)) from error


async def from_store(
    loader: AdapterLoader, read: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """What `read` finds, in a thread of the loader's; a damaged file there is StoreError.

    Not for publishing, where the file at fault may be the one that was sent.
    """
    try:
        return await loader.workers.call(read, *args, **kwargs)
    except FileFormatError as error:
        raise StoreError(str(error)) from error

"""What every route works with: the engine, the adapters, and who is meant by a model's name."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from lorasb_runtime.adapters.loader import AdapterLoader, LoadedAdapter
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.engines.base import Engine
from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError, StoreError
from lorasb_server.blender import Blender
from lorasb_server.errors import FieldError, ModelNotFoundError
from lorasb_server.metrics import Metrics
from lorasb_server.schemas.adapter import AdapterField, BlendPart, InlineAdapter
from lorasb_server.settings import ServerConfig

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

    async def resolve(self, model: str, adapter: AdapterField | None) -> LoadedAdapter | None:
        """The adapter that a request means, None for the base model.

        Raises ModelNotFoundError for a name that nothing answers to, FieldError when both fields
        name an adapter, StoreError when the store fails or holds a damaged file.
        """
        if self.config.is_base(model):
            return None if adapter is None else await self._adapter(adapter)
        if adapter is not None:
            raise FieldError(
                "adapter", "adapter: the model field names an adapter already; give one of them"
            )
        return await self._load("model", model)

    async def _adapter(self, field: AdapterField) -> LoadedAdapter | None:
        match field:
            case str():
                return await self._load("adapter", field)
            case InlineAdapter():
                return await asyncio.to_thread(self._need_blender().inline, field.inline)
            case _:
                return await self._blend(field)

    async def _blend(self, parts: list[BlendPart]) -> LoadedAdapter | None:
        """Every part is looked up, and the first that cannot be had is the one refused."""
        loads = (self._load(f"adapter.{i}.name", part.name) for i, part in enumerate(parts))
        found = []
        for result in await asyncio.gather(*loads, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            found.append(result)
        weights = (part.weight for part in parts)
        return await from_store(self._need_blender().blend, list(zip(found, weights, strict=True)))

    def _need_blender(self) -> Blender:
        self.need_loader()
        assert self.blender is not None
        return self.blender

    def need_loader(self) -> AdapterLoader:
        if self.loader is None:
            raise NotFoundError("this server has no basis, so it has no adapters")
        return self.loader

    async def _load(self, param: str, text: str) -> LoadedAdapter:
        if self.loader is None:
            raise ModelNotFoundError(param, text)
        try:
            name: AdapterName = parse_name(text)
        except InputError:
            raise ModelNotFoundError(param, text) from None
        try:
            return await from_store(self.loader.get, name)
        except NotFoundError:
            raise ModelNotFoundError(param, text) from None


async def from_store(read: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What `read` finds, in a worker thread; a damaged file there is StoreError, not the caller's.

    Not for publishing, where the file at fault may be the one that was sent.
    """
    try:
        return await asyncio.to_thread(read, *args, **kwargs)
    except FileFormatError as error:
        raise StoreError(str(error)) from error

"""What every route works with: the engine, the adapters, and who is meant by a model's name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from lorasb_runtime.adapters.loader import AdapterLoader, LoadedAdapter
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.engines.base import Engine
from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError, StoreError
from lorasb_server.errors import FieldError, ModelNotFoundError
from lorasb_server.metrics import Metrics
from lorasb_server.settings import ServerConfig

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """`loader` is None for a server without a basis, which has no adapters."""

    engine: Engine
    loader: AdapterLoader | None
    config: ServerConfig
    metrics: Metrics

    async def resolve(self, model: str, adapter: str | None) -> LoadedAdapter | None:
        """The adapter that a request means, None for the base model.

        Raises ModelNotFoundError for a name that nothing answers to, FieldError when both fields
        name an adapter, StoreError when the store fails or holds a damaged file.
        """
        if self.config.is_base(model):
            return None if adapter is None else await self._load("adapter", adapter)
        if adapter is not None:
            raise FieldError(
                "adapter", "adapter: the model field names an adapter already; give one of them"
            )
        return await self._load("model", model)

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

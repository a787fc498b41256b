"""What a model's name means to vLLM's own HTTP server: the base model, or an adapter of the store.

Takes the place of vLLM's OpenAIServingModels, whose known names are never looked up again.
"""

import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.engines.vllm.held_versions import (
    AdapterBringer,
    HeldVersions,
    adapter_name,
    numbers_in_use,
)
from lorasb_runtime.engines.vllm.offline import open_loader
from lorasb_runtime.engines.vllm.plugin_settings import PluginSettings
from lorasb_runtime.errors import (
    BasisMismatchError,
    FileFormatError,
    InputError,
    NotFoundError,
    StoreError,
)
from lorasb_runtime.storage.basis_file import load_basis

CLOSED = (
    "adapters come from lorasb's store, which this server reads: publish them there; nothing is "
    "loaded from a path"
)


class ResolvedHere(Mapping[str, LoRARequest]):
    """The adapters that the HTTP request now handled has resolved, and no others.

    vLLM asks whether it knows a name before it resolves one, and for the name's adapter after
    that, in the same task. So each request resolves its name once, and keeps what it has found.
    """

    def __init__(self) -> None:
        self._found: ContextVar[dict[str, LoRARequest] | None] = ContextVar("found", default=None)

    def add(self, name: str, request: LoRARequest) -> None:
        self._found.set({**(self._found.get() or {}), name: request})

    def __getitem__(self, name: str) -> LoRARequest:
        return (self._found.get() or {})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found.get() or {})

    def __len__(self) -> int:
        return len(self._found.get() or {})


class StoreModels(OpenAIServingModels):
    """Names are looked up in the store for every request, at most once in `refresh` seconds."""

    def __init__(self, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(engine_client, *args, **kwargs)
        lora = engine_client.vllm_config.lora_config
        settings = PluginSettings.read(os.environ)
        assert settings is not None
        if lora is None:
            raise InputError("LORASB_BASIS: set, but LoRA is off in vLLM; expected --enable-lora")
        basis = load_basis(settings.basis)
        self.loader = open_loader(settings, basis)
        held = HeldVersions(
            basis, lora.lora_dtype, lora.max_loras, lambda: numbers_in_use(engine_client)
        )
        self._bringer = AdapterBringer(engine_client, held)
        self.lora_requests = ResolvedHere()

    async def init_static_loras(self) -> None:
        if self.static_lora_modules:
            raise InputError(f"--lora-modules: not supported; {CLOSED}")

    async def resolve_lora(self, lora_name: str) -> Any:
        """The request for the name's current version, or vLLM's error response 404.

        Raises vLLM's error with a status for an adapter that cannot be served (422) and for a
        store that does not answer (503).
        """
        try:
            adapter = await self._load(lora_name)
        except InputError:  # unknown, or no name at all
            return create_error_response(
                message=f"The model `{lora_name}` does not exist.",
                err_type="NotFoundError",
                status_code=HTTPStatus.NOT_FOUND,
                param="model",
            )
        request = await self._bringer.bring(adapter)
        self.lora_requests.add(lora_name, request)
        return request

    async def _load(self, text: str) -> LoadedAdapter:
        name = parse_name(text)
        try:
            return await self.loader.load(name)
        except NotFoundError:
            raise
        except (FileFormatError, BasisMismatchError) as error:
            raise GracefulHTTPError(str(error), HTTPStatus.UNPROCESSABLE_ENTITY) from None
        except StoreError as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from None

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """The name that the caller used, without the version that we put into it."""
        name: str = super().model_name(lora_request)
        return name if lora_request is None else adapter_name(name)

    async def show_available_models(self) -> Any:
        """The base models, then the store's adapters where it can be listed."""
        listed = await self.registry.show_available_models()
        store = self.loader.store
        names = await self.loader.workers.call(store.names, None) if store.files.listable else []
        base = self.base_model_paths[0].name
        listed.data.extend(
            ModelCard(id=str(name), parent=base, permission=[ModelPermission()]) for name in names
        )
        return listed

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        return _closed()

    async def unload_lora_adapter(self, request: Any) -> Any:
        return _closed()


def _closed() -> Any:
    return create_error_response(
        message=CLOSED, err_type="PermissionDeniedError", status_code=HTTPStatus.FORBIDDEN
    )

"""Adapters of a store for vLLM's `LLM` class, by name.

adapters = StoreAdapters(llm)
llm.generate(prompts, params, lora_request=adapters.request("alice"))
"""

import os
from typing import Any

from vllm.lora.request import LoRARequest

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_config import LoaderConfig
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.retry import Retry
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.engines.vllm.held_versions import HeldVersions, numbers_in_use
from lorasb_runtime.engines.vllm.plugin_settings import BASIS, STORE, PluginSettings
from lorasb_runtime.errors import InputError
from lorasb_runtime.storage.basis_file import Basis, load_basis


def open_loader(settings: PluginSettings, basis: Basis) -> AdapterLoader:
    """The loader of the configured store. Raises InputError where there is none."""
    if settings.store is None:
        raise InputError(f"{STORE}: not set, expected the URL of an adapter store")
    config = LoaderConfig(refresh=settings.refresh)
    return AdapterLoader(AdapterStore(settings.store, Retry(config.retry_config())), basis, config)


class StoreAdapters:
    """Names of the store that LORASB_ADAPTERS names, for an `LLM` started with the plugin."""

    def __init__(self, llm: Any) -> None:
        settings = PluginSettings.read(os.environ)
        if settings is None:
            raise InputError(f"{BASIS}: not set, expected the basis file that the plugin serves")
        self._engine = llm.llm_engine
        lora = self._engine.vllm_config.lora_config
        if lora is None:
            raise InputError("enable_lora: found false, expected true")
        basis = load_basis(settings.basis)
        self.loader = open_loader(settings, basis) if settings.store else None
        self._held = HeldVersions(
            basis, lora.lora_dtype, lora.max_loras, lambda: numbers_in_use(self._engine)
        )

    def request(self, name: str) -> LoRARequest:
        """For the current version of an adapter; raises as `AdapterLoader.get` does."""
        if self.loader is None:
            raise InputError(f"{STORE}: not set, expected the URL of an adapter store")
        return self.hold(self.loader.get(parse_name(name)))

    def hold(self, adapter: LoadedAdapter) -> LoRARequest:
        """For an adapter at hand, a blend say."""
        request = self._held.request(adapter)
        if request is None:
            message = self._held.message(adapter)
            self._engine.add_lora(message)
            self._held.added(adapter, message.lora_int_id)
            for number in self._held.take_surplus():
                self._engine.remove_lora(number)
            request = self._held.request(adapter)
            assert request is not None
        return request

"""Every place where we reach into vLLM, in one list, checked before anything is changed.

Two names are bound to our classes; everything else is vLLM's own classes used or extended by name.
"""

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import parent_process

from lorasb_runtime.engines.vllm.plugin_settings import PluginSettings
from lorasb_runtime.errors import EngineError, InputError

KNOWN = "0.32."


@dataclass(frozen=True)
class PatchPoint:
    """`module.name`, which vLLM looks up when it makes an object, becomes `replacement`."""

    module: str
    name: str
    replacement: str


# The worker's manager of LoRAs: it chooses the layer classes, fills slots, maps tokens to slots.
WORKER = PatchPoint(
    "vllm.v1.worker.lora_model_runner_mixin",
    "LRUCacheWorkerLoRAManager",
    "lorasb_runtime.engines.vllm.manager:SharedBasisManager",
)
# The HTTP server's list of models: it resolves a name for each request.
SERVER = PatchPoint(
    "vllm.entrypoints.launchers.api_server.app_state",
    "OpenAIServingModels",
    "lorasb_runtime.engines.vllm.serving_models:StoreModels",
)
# Without it vLLM's server resolves no names. The routes that it opens are closed by StoreModels.
RESOLVE_FLAG = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"

# What our classes call, extend or override: "module:object" or "module:class.attribute".
USED_BY_WORKER = (
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
    "vllm.lora.worker_manager:WorkerLoRAManager.create_lora_manager",
    "vllm.lora.worker_manager:WorkerLoRAManager.set_active_adapters",
    "vllm.lora.worker_manager:WorkerLoRAManager.add_adapter",
    "vllm.lora.worker_manager:WorkerLoRAManager.remove_adapter",
    "vllm.lora.worker_manager:WorkerLoRAManager.remove_all_adapters",
    "vllm.lora.worker_manager:WorkerLoRAManager.list_adapters",
    "vllm.lora.worker_manager:WorkerLoRAManager.pin_adapter",
    "vllm.lora.worker_manager:WorkerLoRAManager.add_dummy_lora",
    "vllm.lora.worker_manager:WorkerLoRAManager.get_dummy_lora_warmup_rank",
    "vllm.lora.worker_manager:WorkerLoRAManager.supports_tower_connector_lora",
    "vllm.lora.layers:ColumnParallelLinearWithLoRA.forward",
    "vllm.lora.layers:RowParallelLinearWithLoRA.forward",
    "vllm.lora.layers:ReplicatedLinearWithLoRA.forward",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_sync",
    "vllm.lora.layers.utils:LoRAMapping",
    "vllm.lora.utils:replace_submodule",
    "vllm.lora.request:LoRARequest.lora_path",
    "vllm.model_executor.layers.linear:ColumnParallelLinear",
    "vllm.model_executor.layers.linear:MergedColumnParallelLinear",
    "vllm.model_executor.layers.linear:QKVParallelLinear",
    "vllm.model_executor.layers.linear:RowParallelLinear",
    "vllm.model_executor.layers.linear:ReplicatedLinear",
    "vllm.model_executor.models.utils:PPMissingLayer",
    "vllm.model_executor.utils:get_packed_modules_mapping",
)
USED_BY_SERVER = (
    "vllm.entrypoints.launchers.api_server.app_state:OpenAIServingModels.resolve_lora",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.init_static_loras",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter",
    "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
    "vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters",
    "vllm.entrypoints.serve:create_error_response",
)


def install(settings: PluginSettings) -> None:
    """Check vLLM, then bind our classes; a second call changes nothing.

    The server's part is for the process that the server runs in, and only with a store.
    """
    check_version()
    check_names(USED_BY_WORKER)
    serves = settings.store is not None and parent_process() is None
    if serves:
        check_names(USED_BY_SERVER)
        os.environ[RESOLVE_FLAG] = "1"
    check_basis_file(settings)
    for point in (WORKER, SERVER) if serves else (WORKER,):
        setattr(importlib.import_module(point.module), point.name, find(point.replacement))


def check_version() -> None:
    """Raises EngineError for a vLLM that these patches were not written for."""
    import vllm

    if not vllm.__version__.startswith(KNOWN):
        raise EngineError(
            f"vllm: found version {vllm.__version__}, expected {KNOWN}*, the one that lorasb's "
            "plugin was written for; unset LORASB_BASIS to run vLLM without it"
        )


def check_names(names: Iterable[str]) -> None:
    """Raises EngineError for the first name that this vLLM does not have."""
    for name in names:
        try:
            find(name)
        except (ImportError, AttributeError) as error:
            raise EngineError(
                f"vllm: found no {name} ({error}), which lorasb's plugin needs; it was written "
                f"for version {KNOWN}*"
            ) from None


def check_basis_file(settings: PluginSettings) -> None:
    """A missing basis ends vLLM here, and not after its model is loaded."""
    if not settings.basis.is_file():
        raise InputError(f"LORASB_BASIS: found no file {settings.basis}, expected a basis file")


def find(path: str) -> object:
    """The object that "module:name.name" names."""
    module, _, names = path.partition(":")
    found: object = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found

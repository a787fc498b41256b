"""The worker's side: puts the layers into the model, and cores into slots as requests come.

Takes the place of vLLM's LRUCacheWorkerLoRAManager. Cores come by vLLM's own `add_lora` and go by
its `remove_lora`; what is held here stays until then, so that no request ever lacks its version.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.utils import replace_submodule
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.utils import get_packed_modules_mapping

from lorasb_runtime.engines.vllm.core_message import parse_message, version_in
from lorasb_runtime.engines.vllm.layers import shared_layer, shared_pair
from lorasb_runtime.engines.vllm.placement import Group, place_targets
from lorasb_runtime.engines.vllm.plugin_settings import PluginSettings
from lorasb_runtime.engines.vllm.resident import ResidentCores, base_rows
from lorasb_runtime.engines.vllm.shared_delta import SharedDelta
from lorasb_runtime.errors import EngineError, InputError
from lorasb_runtime.models.locate import locate_model
from lorasb_runtime.storage.basis_file import Basis, load_basis
from lorasb_runtime.storage.checkpoint import open_checkpoint
from lorasb_runtime.storage.match import check_model

logger = logging.getLogger(__name__)

DUMMY_SLOT = 1  # what the adapters of vLLM's warm-up runs are given


@dataclass(frozen=True)
class Held:
    """An adapter version in the worker's memory; cores: [D] of the whole basis, scaled."""

    version: str
    cores: torch.Tensor


class SharedBasisManager(WorkerLoRAManager):
    """vLLM makes one in each worker where LoRA is on; the basis is the environment's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[int, Held] = {}
        self._dummies: set[int] = set()

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Put the layers of all targets into the model; gives the model.

        Raises BasisMismatchError for a basis that is not this model's, InputError for settings that
        do not go with cores.
        """
        settings = PluginSettings.read(os.environ)
        assert settings is not None
        if self.lora_config.fully_sharded_loras:
            raise InputError("fully_sharded_loras: found true; cores cannot be cut by rank")
        if self.lora_config.lora_dtype != vllm_config.model_config.dtype:
            raise InputError(
                f"lora_dtype: found {self.lora_config.lora_dtype}, expected the model's "
                f"{vllm_config.model_config.dtype}, in which A, B and cores are multiplied"
            )
        basis = load_basis(settings.basis)
        if vllm_config.load_config.load_format != "dummy":
            model_config = vllm_config.model_config
            folder = locate_model(model_config.model, model_config.revision)
            check_model(basis, open_checkpoint(folder), str(settings.basis))
        # vLLM's cache of compiled code knows LoRA's settings alone.
        if isinstance(vllm_config.additional_config, dict):
            vllm_config.additional_config["lorasb_basis"] = basis.digest
        packed = get_packed_modules_mapping(model)
        groups = place_groups(model, basis, packed)
        self.resident = ResidentCores(
            basis,
            groups,
            adapters=self.lora_config.max_loras,
            max_tokens=self.max_num_batched_tokens,
            dtype=self.lora_config.lora_dtype,
            device=self.device,
        )
        install_groups(model, basis, groups, packed, self.resident)
        logger.info("lorasb: %d adapters fit beside each other", self.resident.slots.capacity)
        return model

    def add_adapter(self, request: LoRARequest) -> bool:
        """Hold the cores that the request's path carries; those that are held already stay.

        Raises EngineError where the number is another version's.
        """
        if request.lora_int_id in self._held:
            self._find(request)
            return False
        version, cores = parse_message(request.lora_path, self.lora_config.lora_dtype)
        self._held[request.lora_int_id] = Held(version, cores)
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget the cores; vLLM's front end asks for it when no request needs them."""
        held = self._held.pop(adapter_id, None)
        if held is not None:
            self.resident.release(held.version)
        return held is not None

    def remove_all_adapters(self) -> None:
        """After vLLM's warm-up, and when it has replaced the base model's weights."""
        self._dummies.clear()
        for adapter_id in list(self._held):
            self.remove_adapter(adapter_id)

    def list_adapters(self) -> set[int]:
        return set(self._held)

    def pin_adapter(self, adapter_id: int) -> bool:
        raise InputError("pin_lora: not supported; what is in use stays resident anyway")

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Bring the step's adapters into slots and give each token its own."""
        slot_of = dict.fromkeys(self._dummies, DUMMY_SLOT)
        held = {r.lora_int_id: self._find(r) for r in requests if r.lora_int_id not in slot_of}
        slots = self.resident.activate({h.version: h.cores for h in held.values()})
        slot_of |= {adapter_id: slots[h.version] for adapter_id, h in held.items()}
        if mapping is not None:
            self.resident.map_tokens(base_rows(mapping.index_mapping, slot_of))

    def _find(self, request: LoRARequest) -> Held:
        held = self._held.get(request.lora_int_id)
        if held is None or held.version != version_in(request.lora_path):
            raise EngineError(
                f"adapter {request.lora_name}: found no cores of {request.lora_path:.80}, "
                "expected them to have come by add_lora"
            )
        return held

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """For warm-up runs, whose results nobody reads."""
        self._dummies.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        return False


def place_groups(model: nn.Module, basis: Basis, packed: dict[str, list[str]]) -> list[Group]:
    """Where the targets are in this worker's part of the model."""
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, LinearBase)]
    missing = tuple(f"{n}." for n, module in modules.items() if isinstance(module, PPMissingLayer))
    mapper = getattr(model, "hf_to_vllm_mapper", None)

    def rename(name: str) -> str:
        mapped = name if mapper is None else mapper.get_rename_mapper()._map_name(name)
        return name if mapped is None else str(mapped)

    return place_targets(
        basis.targets, layers, packed, lambda name: name.startswith(missing), rename
    )


def install_groups(
    model: nn.Module,
    basis: Basis,
    groups: list[Group],
    packed: dict[str, list[str]],
    resident: ResidentCores,
) -> None:
    """Replace every layer that has a target by one with the shared pair beside it."""
    deltas: dict[str, list[SharedDelta]] = {}
    device, dtype = resident.slots.cores.device, resident.slots.cores.dtype
    for number, group in enumerate(groups):
        base = model.get_submodule(group.layer)
        members = len(packed.get(group.layer.rpartition(".")[2], [group.layer]))
        a, bs, begins = shared_pair(base, members, group, basis)
        placed = [b.to(device, dtype) for b in bs]
        delta = SharedDelta(a.to(device, dtype), placed, begins, resident, number)
        deltas.setdefault(group.layer, []).append(delta)
    for name, parts in deltas.items():
        replace_submodule(model, name, shared_layer(model.get_submodule(name), name, parts))

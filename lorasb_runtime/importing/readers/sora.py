"""SoRA (arXiv 2311.11696): LoRA with a gate between A and B, in OpenDelta's checkpoint format."""

from typing import Any

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.folder import CheckpointFolder
from lorasb_runtime.importing.foreign import Factors, ForeignAdapter
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.peft_tensors import SPELLINGS, by_module, in_model_order
from lorasb_runtime.importing.read_factors import read_factors
from lorasb_runtime.storage.json_file import read_json_object

NAME = "sora"
CONFIG = "config.json"
# OpenDelta and the trainer write pickles; these are what they are converted to.
WEIGHTS = ("model.safetensors", "pytorch_model.safetensors")


def recognises(folder: CheckpointFolder) -> bool:
    if not folder.has(CONFIG) or not any(folder.has(name) for name in WEIGHTS):
        return False
    return any(SPELLINGS["sora_gate"].search(name) for name in folder.weights(*WEIGHTS).names)


def read(folder: CheckpointFolder, model: Model | None) -> ForeignAdapter:
    """The gate as a diagonal core, without its zeros; the scaling stays alpha / r of the start.

    Raises FileFormatError, and InputError for tensors that were trained beside the deltas.
    """
    file = folder.weights(*WEIGHTS)
    tensors = by_module(file, ("sora_A", "sora_B", "sora_gate"))
    initial, alpha = _settings(folder)
    modules: dict[str, Factors] = {}
    closed = []
    for module in in_model_order(tensors):
        names = tensors[module]
        gate = file.tensor(names["sora_gate"], 2)
        if gate.shape[0] != 1:
            raise file.wrong(f"{names['sora_gate']} of shape {list(gate.shape)}", "[1, r]")
        parts = (names["sora_A"], names["sora_B"])
        factors = read_factors(file, module, *parts, alpha / initial, gate[0])
        if gate.shape[1] > initial:
            raise file.wrong(f"{module} of rank {gate.shape[1]}", f"at most lora_r, {initial}")
        kept = gate[0] != 0
        if kept.any():
            modules[module] = Factors(
                factors.b[:, kept], factors.a[kept], gate[0][kept], factors.scaling
            )
        else:
            closed.append(module)
    if not modules:
        raise file.wrong("gates that are all zero", "one that is open")
    info = {"closed": closed} if closed else {}
    return ForeignAdapter(folder.source, NAME, modules, info=info)


def _settings(folder: CheckpointFolder) -> tuple[int, float]:
    """lora_r and lora_alpha of OpenDelta's config.json."""
    path = folder.path / CONFIG
    config = read_json_object(path)
    if "lora_r" not in config or "lora_alpha" not in config:
        raise InputError(
            f"{path}: found no lora_r and lora_alpha, expected OpenDelta's configuration; a "
            "trainer may have written the base model's instead: put the run's own there"
        )
    rank, alpha = config["lora_r"], config["lora_alpha"]
    if type(rank) is not int or rank < 1 or not _is_scale(alpha):
        found = f"lora_r {rank!r:.40} and lora_alpha {alpha!r:.40}"
        raise FileFormatError(str(path), found, "a whole number above zero and a number")
    return rank, float(alpha)


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 < abs(value) < 1e30

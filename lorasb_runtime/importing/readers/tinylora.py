"""PEFT's TinyLoRA (arXiv 2602.04118): a core that is a sum of fixed matrices, R = sum v_i P_i."""

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.folder import CheckpointFolder, TensorFile
from lorasb_runtime.importing.foreign import Factors, ForeignAdapter
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.peft_config import PeftConfig
from lorasb_runtime.importing.peft_tensors import by_module
from lorasb_runtime.importing.read_factors import read_factors
from lorasb_runtime.ops.rounding import round_once

NAME = "peft-tinylora"
VECTORS = "base_model.tinylora_v."


def recognises(folder: CheckpointFolder) -> bool:
    return folder.peft_config.get("peft_type") == "TINYLORA"


def read(folder: CheckpointFolder, model: Model | None) -> ForeignAdapter:
    """B, R and A of each module, at scaling 1; R is summed in float64 and rounded once.

    A vector v belongs to a run of modules in the model's order, so the model is needed where
    there is more than one. Raises InputError without it, or without the matrices P: PEFT would
    draw those again from a seed, which is not the same on every machine.
    """
    config, file = PeftConfig(folder), folder.peft_weights
    vectors = [name for name in file.names if name.startswith(VECTORS)]
    if not any("tinylora_P" in name for name in file.names):
        raise InputError(
            f"{folder.source}: found no tinylora_P, the matrices that the cores are sums of; "
            "load it with PEFT where it was trained and save it with save_projection=True"
        )
    tensors = by_module(file, ("tiny_A", "tiny_B", "tiny_P"), frozenset(vectors))
    tying = config.number("weight_tying", 0.0)
    groups = max(1, round(len(tensors) * (1.0 - tying)))
    order = _model_order(folder, list(tensors), model, groups)
    modules: dict[str, Factors] = {}
    for index, module in enumerate(order):
        group = min(index // max(1, len(tensors) // groups), groups - 1)
        names = tensors[module]
        core = _core(file, names["tiny_P"], f"{VECTORS}{group}")
        modules[module] = read_factors(file, module, names["tiny_A"], names["tiny_B"], 1.0, core)
    if len(vectors) != groups:
        raise file.wrong(f"{len(vectors)} vectors", f"{groups} for a weight_tying of {tying}")
    return ForeignAdapter(
        folder.source,
        NAME,
        modules,
        shared=True,
        transposed=config.transposed_of(modules),
        base_model=config.base_model,
    )


def _model_order(
    folder: CheckpointFolder, modules: list[str], model: Model | None, groups: int
) -> list[str]:
    if groups == 1:
        return sorted(modules)
    if model is None:
        raise InputError(
            f"{folder.source}: found {groups} vectors, which belong to the model's modules in "
            "their order; pass --model"
        )
    known = [name for name in model.layers if name in modules]
    unknown = sorted(set(modules) - set(known))
    if unknown:
        raise InputError(
            f"{folder.source}: found a delta for {unknown[0]}, which is no linear layer of "
            f"{model.identity.name}"
        )
    return known


def _core(file: TensorFile, matrices: str, vector: str) -> torch.Tensor:
    """sum v_i P_i, [r, r] in float32."""
    if vector not in file.names:
        raise file.wrong(f"no tensor {vector!r}", "one for each group of modules")
    v, p = file.tensor(vector, 1), file.tensor(matrices, 3)
    if v.shape[0] != p.shape[0] or p.shape[1] != p.shape[2]:
        found = f"{matrices} of shape {list(p.shape)} and {vector} of {list(v.shape)}"
        raise file.wrong(found, "[u, r, r] and [u]")
    return round_once(torch.einsum("i,ijk->jk", v.double(), p.double()), torch.float32)

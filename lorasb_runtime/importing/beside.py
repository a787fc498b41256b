"""Tensors that PEFT saves beside an adapter's own and that change nothing, once that is checked."""

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.folder import TensorFile
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.peft_tensors import PREFIX, check_module

BASE_COPY = ".base_layer.weight"
TRAINING_STATE = ".lora_velora_"  # VeLoRA's, for the backward pass alone


def names_beside(file: TensorFile, model: Model | None) -> frozenset[str]:
    """The names of training state, and of copies of the base model's output embedding.

    PEFT writes such a copy where that layer has a LoRA; it is the base model's, unless the
    vocabulary was changed. Raises InputError where that cannot be told, or is so.
    """
    beside = set()
    for name in file.names:
        if TRAINING_STATE in name:
            beside.add(name)
        elif name.endswith(BASE_COPY):
            _check_copy(file, name, model)
            beside.add(name)
    return frozenset(beside)


def _check_copy(file: TensorFile, name: str, model: Model | None) -> None:
    module = check_module(file, name.removesuffix(BASE_COPY).removeprefix(PREFIX))
    if model is None:
        raise InputError(
            f"{file.source}: found {name!r}, a copy of the base model's weight or another in its "
            "place; pass --model to have them compared"
        )
    own = model.read_weight(module)
    copy = file.tensor(name, 2)
    if own is None or own.shape != copy.shape or not torch.equal(own.float(), copy.float()):
        raise InputError(
            f"{file.source}: found {name!r} unlike the weight of {model.identity.name}, expected "
            "the base model's own; a changed vocabulary cannot be imported"
        )

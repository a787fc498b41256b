"""Folding an adapter into a model in memory."""

import torch
from torch import nn

from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.merging.delta import core_deltas
from lorasb_runtime.merging.fold import Survival, adding_dtype, fold_weight
from lorasb_runtime.models.targets import is_linear, weight_of
from lorasb_runtime.storage.basis_file import Basis


@torch.no_grad()
def fold_into_model(model: nn.Module, basis: Basis, scaled_cores: torch.Tensor) -> Survival:
    """Fold an adapter into a loaded model's target weights, in their own dtype and place.

    scaled_cores: [D], from `scale_core`. Raises BasisMismatchError when a target is missing, no
    linear layer or of another shape, and InputError when a weight is no plain float tensor or is
    shared with another layer; every target is checked before the first is changed.
    """
    weights = _target_weights(model, basis)
    total = Survival()
    for index, weight in enumerate(weights):
        deltas = core_deltas(basis, scaled_cores, weight.device)
        delta = deltas(index, adding_dtype(weight.dtype))
        total += fold_weight(weight, delta, weight, basis.targets[index].module)
    return total


def _target_weights(model: nn.Module, basis: Basis) -> list[torch.Tensor]:
    """Each target's weight as [out, in], views of the model's own storage."""
    modules = dict(model.named_modules())
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[parameter.data_ptr()] = uses.get(parameter.data_ptr(), 0) + 1
    weights = []
    for target in basis.targets:
        module = modules.get(target.module)
        if module is None or not is_linear(module):
            found = "no such module" if module is None else type(module).__name__
            raise BasisMismatchError(f"{target.module}: found {found}, expected a linear layer")
        weight = weight_of(module)
        expected = [target.out_features, target.in_features]
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise InputError(f"{target.module}: found {weight.dtype}, expected a plain float dtype")
        if list(weight.shape) != expected:
            raise BasisMismatchError(
                f"{target.module}: found a weight of {list(weight.shape)}, expected {expected}"
            )
        if uses.get(weight.data_ptr(), 0) > 1:
            raise InputError(
                f"{target.module}: found a weight shared with another layer (tied embeddings), "
                "expected one of its own"
            )
        weights.append(weight)
    return weights

"""Folding an adapter into a model in memory."""

import torch
from torch import nn

from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.merging.delta import core_deltas
from lorasb_runtime.merging.fold import adding_dtype, fold_target
from lorasb_runtime.merging.survival import Survival
from lorasb_runtime.models.targets import is_linear, is_transposed, weight_of
from lorasb_runtime.ops.threads import one_thread
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
    with one_thread():
        for index, weight in enumerate(weights):
            target = basis.targets[index]
            adding = adding_dtype(weight.dtype)
            delta = core_deltas(basis, scaled_cores, weight.device)(index, adding)
            total += fold_target(weight, delta, weight.dtype, weight.__setitem__, target)
    return total


def _target_weights(model: nn.Module, basis: Basis) -> list[torch.Tensor]:
    """Each target's weight as the model stores it, [in, out] where the target is transposed."""
    modules = dict(model.named_modules())
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[parameter.data_ptr()] = uses.get(parameter.data_ptr(), 0) + 1
    weights = []
    for target in basis.targets:
        module = modules.get(target.module)
        if module is None or not is_linear(module):
            kind = "no such module" if module is None else type(module).__name__
            raise BasisMismatchError(f"{target.module}: found {kind}, expected a linear layer")
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        expected = [target.out_features, target.in_features]
        found = list(weight_of(module).shape)
        if is_transposed(module) != target.transposed:
            raise BasisMismatchError(
                f"{target.module}: found a {type(module).__name__}, expected a weight that lies "
                "the other way round"
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise InputError(f"{target.module}: found {weight.dtype}, expected a plain float dtype")
        if found != expected:
            raise BasisMismatchError(
                f"{target.module}: found a weight of {found}, expected {expected}"
            )
        if uses.get(weight.data_ptr(), 0) > 1:
            raise InputError(
                f"{target.module}: found a weight shared with another layer (tied embeddings), "
                "expected one of its own"
            )
        weights.append(weight)
    return weights

"""Folding: W0 + B R A into one weight, and the measure of what rounding left of the delta."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.models.targets import is_linear, weight_of
from lorasb_runtime.ops.core_matmul import dense_delta
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import TargetModule

# A weight is folded by rows, about so many entries at a time: few enough for the processor's cache.
BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Survival:
    """What became of a delta in the stored weights; sums over entries, in float64.

    stored = W_out - W0, the change that really lies in the output.
    """

    weight: float = 0.0  # |W0|^2
    delta: float = 0.0  # |delta|^2
    overlap: float = 0.0  # <stored, delta>
    error: float = 0.0  # |stored - delta|^2

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(
            self.weight + other.weight,
            self.delta + other.delta,
            self.overlap + other.overlap,
            self.error + other.error,
        )

    @property
    def ratio(self) -> float:
        """rms(delta) / rms(W0); 0 where there are no weights."""
        return (self.delta / self.weight) ** 0.5 if self.weight else 0.0

    @property
    def kept(self) -> float:
        """Share of the delta that survived the rounding; 1 for a delta of zero."""
        return self.overlap / self.delta if self.delta else 1.0

    @property
    def relative_error(self) -> float:
        """|stored - delta| / |delta|; 0 for a delta of zero."""
        return (self.error / self.delta) ** 0.5 if self.delta else 0.0


@dataclass(frozen=True)
class TargetDelta:
    """One target's delta in factors, float32: b [out, r], scaled_core [r, r], a [r, in]."""

    target: TargetModule
    b: torch.Tensor
    scaled_core: torch.Tensor
    a: torch.Tensor


def target_delta(
    basis: Basis, index: int, scaled_cores: torch.Tensor, device: torch.device | None = None
) -> TargetDelta:
    """Target `index`'s delta; `scaled_cores` [D] in any float dtype, from `scale_core`."""
    target = basis.targets[index]
    core = basis.core(scaled_cores, index).to(device, torch.float32)
    return TargetDelta(
        target, basis.b(target.module).to(device), core, basis.a(target.module).to(device)
    )


def fold_weight(weight: torch.Tensor, delta: TargetDelta, out: torch.Tensor) -> Survival:
    """Write round(W0 + delta) into `out`: added in float32, rounded once to `out`'s dtype.

    weight, out: [out, in], views allowed, and `out` may be `weight` itself. A float64 weight is
    added in float64. Raises InputError when a value leaves the range of `out`'s dtype.
    """
    survival = Survival()
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    with _one_thread():
        for start in range(0, weight.shape[0], rows):
            survival += _fold_rows(weight, delta, out, slice(start, start + rows))
    return survival


def _fold_rows(
    weight: torch.Tensor, delta: TargetDelta, out: torch.Tensor, part: slice
) -> Survival:
    before = weight[part].to(torch.promote_types(weight.dtype, torch.float32))
    wanted = dense_delta(delta.b[part], delta.scaled_core, delta.a)
    folded = (before + wanted).to(out.dtype)
    survival = _survival(before, wanted, folded)
    if not math.isfinite(survival.error):
        raise InputError(
            f"{delta.target.module}: found Inf or NaN in the merged weight, expected numbers "
            f"that fit {str(out.dtype).removeprefix('torch.')}"
        )
    out[part] = folded
    return survival


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: blocks are small, and waiting for a busy core costs far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _survival(before: torch.Tensor, wanted: torch.Tensor, folded: torch.Tensor) -> Survival:
    w0, delta = before.double().flatten(), wanted.double().flatten()
    stored = folded.double().flatten() - w0
    overlap = torch.dot(stored, delta).item()
    error = stored.sub_(delta)
    return Survival(
        weight=torch.dot(w0, w0).item(),
        delta=torch.dot(delta, delta).item(),
        overlap=overlap,
        error=torch.dot(error, error).item(),
    )


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
        delta = target_delta(basis, index, scaled_cores, weight.device)
        total += fold_weight(weight, delta, weight)
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

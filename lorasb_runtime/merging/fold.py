"""Folding: W0 + B R A into one weight, and the measure of what rounding left of the delta."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lorasb_runtime.errors import InputError
from lorasb_runtime.models.targets import weight_of
from lorasb_runtime.ops.core_matmul import dense_delta
from lorasb_runtime.storage.basis_file import Basis


@dataclass(frozen=True)
class Survival:
    """What became of a delta in the stored weights; sums of squares over entries, in float64.

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
        """rms(delta) / rms(W0)."""
        return (self.delta / self.weight) ** 0.5 if self.weight else 0.0

    @property
    def kept(self) -> float:
        """Share of the delta that survived the rounding; 1 for a delta of zero."""
        return self.overlap / self.delta if self.delta else 1.0

    @property
    def relative_error(self) -> float:
        return (self.error / self.delta) ** 0.5 if self.delta else 0.0


def fold_weight(
    weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, Survival]:
    """round(W0 + delta): added in float32, rounded once to `dtype`. Both [out, in].

    Raises InputError when a weight leaves the range of `dtype`.
    """
    before = weight.float()
    folded = (before + delta).to(dtype)
    if not torch.isfinite(folded).all():
        raise InputError(f"the merged weight does not fit {dtype}: found Inf or NaN")
    wanted = delta.double()
    stored = folded.double() - before.double()
    survival = Survival(
        weight=before.double().square().sum().item(),
        delta=wanted.square().sum().item(),
        overlap=(stored * wanted).sum().item(),
        error=(stored - wanted).square().sum().item(),
    )
    return folded, survival


def target_delta(basis: Basis, index: int, scaled_cores: torch.Tensor) -> torch.Tensor:
    """Target `index`'s delta [out, in] in float32; `scaled_cores` [D] from `scale_core`."""
    module = basis.targets[index].module
    core = basis.core(scaled_cores, index).float()
    return dense_delta(basis.b(module), core, basis.a(module))


@torch.no_grad()
def fold_into_model(model: PreTrainedModel, basis: Basis, scaled_cores: torch.Tensor) -> Survival:
    """Fold an adapter into a loaded model's weights, in the model's own dtype."""
    total = Survival()
    for index, target in enumerate(basis.targets):
        weight = weight_of(model.get_submodule(target.module))
        delta = target_delta(basis, index, scaled_cores).to(weight.device)
        folded, survival = fold_weight(weight, delta, weight.dtype)
        weight.copy_(folded)
        total += survival
    return total

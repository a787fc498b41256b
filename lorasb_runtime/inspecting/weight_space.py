"""From cores to coordinates in which lengths and angles are those of the deltas themselves."""

import math

import torch

from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.storage.basis_file import Basis

# Pairs in float32 are off by less; those that were rounded to bfloat16 by more.
ORTHONORMAL = 1e-4


class WeightSpace:
    """For a target with B = Qb Tb and A' = Qa Ta, the core Tb R Ta' has the delta's geometry.

    Norms, angles and singular values of scaling * Tb R Ta' are those of scaling * B R A, whether B
    and A are orthonormal or not, and no delta is formed.
    """

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        self._triangles = [self._triangles_of(target.module) for target in basis.targets]

    @property
    def off_orthonormal(self) -> tuple[float, float]:
        """The largest entries of |B'B - I| and of |AA' - I| over all targets."""
        b, a = zip(*self._triangles, strict=True)
        return max(map(_off_identity, b)), max(map(_off_identity, a))

    @property
    def orthonormal(self) -> bool:
        """Then distances are abs(scaling) times those between cores."""
        return max(self.off_orthonormal) <= ORTHONORMAL

    def core(self, cores: torch.Tensor, index: int) -> torch.Tensor:
        """Target `index`'s part of flat cores [D] in these coordinates, [r, r] in float64."""
        return self.scaled(self.basis.core(cores, index), index)

    def scaled(self, core: torch.Tensor, index: int) -> torch.Tensor:
        """The same for one core [r, r] of target `index`."""
        b, a = self._triangles[index]
        return b @ scale_core(core.double(), self.basis.scaling) @ a.t()

    def pair(self, index: int) -> torch.Tensor:
        """What has the singular values of B @ A, [r, r] in float64; no scaling."""
        b, a = self._triangles[index]
        return b @ a.t()

    def _triangles_of(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        b, a = self.basis.b(module).double(), self.basis.a(module).double()
        return torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.t(), mode="r").R


def singular_values(matrix: torch.Tensor) -> tuple[float, ...]:
    return tuple(torch.linalg.svdvals(matrix).tolist())


def _off_identity(triangle: torch.Tensor) -> float:
    gram = triangle.t() @ triangle
    off = (gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max().item()
    return off if math.isfinite(off) else math.inf

"""Which method a frozen pair (B, A) looks like, by how orthonormal its columns and rows are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lorasb_runtime.importing.foreign import Factors

# Bases that were rounded to bfloat16 are off by up to 2e-3.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Orthonormality:
    """The largest entries, over all modules, of |B'B - I|, |AA' - I| and AA' outside its diagonal.

    The last is relative to the two rows' norms.
    """

    b: float
    a: float
    a_angle: float

    @property
    def method(self) -> str | None:
        """lora-sb: both orthonormal. lora-xs: B orthonormal, A's rows orthogonal. Else None."""
        if self.b > TOLERANCE or self.a_angle > TOLERANCE:
            return None
        return "lora-sb" if self.a <= TOLERANCE else "lora-xs"


def measure(modules: Iterable[Factors]) -> Orthonormality:
    """Of frozen pairs; rows and columns of zeros are neither orthonormal nor orthogonal.

    Infinite where there are more of them than dimensions.
    """
    b = a = angle = 0.0
    for factors in modules:
        if factors.b.shape[1] > min(factors.b.shape[0], factors.a.shape[1]):
            return Orthonormality(math.inf, math.inf, math.inf)
        b = max(b, _off_identity(_gram(factors.b.t())))
        gram = _gram(factors.a)
        a = max(a, _off_identity(gram))
        norms = gram.diagonal().sqrt()
        cosines = gram / (norms[:, None] * norms)
        angle = max(angle, _off_identity(cosines.nan_to_num(nan=2.0)))
    return Orthonormality(b, a, angle)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.double()
    return wide @ wide.t()


def _off_identity(gram: torch.Tensor) -> float:
    return (gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max().item()

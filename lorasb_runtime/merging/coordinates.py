"""Coordinates of one target's cores in which their lengths and angles are those of their deltas."""

from dataclasses import dataclass

import torch

from lorasb_runtime.storage.basis_file import Basis


@dataclass(frozen=True)
class Coordinates:
    """With B = Q_B left and A = right Q_A, Q_B and Q_A orthonormal: B R A = Q_B (left R right) Q_A.

    left, right: [r, r] in float64; close to diagonals of 1 and -1 for an orthonormal basis.
    """

    left: torch.Tensor
    right: torch.Tensor

    def enter(self, core: torch.Tensor) -> torch.Tensor:
        """left R right, whose inner products are those of the deltas B R A."""
        return self.left @ core @ self.right

    def leave(self, core: torch.Tensor) -> torch.Tensor:
        """The R of least norm that has this delta, also where B or A has no full rank."""
        left: torch.Tensor = torch.linalg.pinv(self.left)
        right: torch.Tensor = torch.linalg.pinv(self.right)
        return left @ core @ right


def orthonormal_coordinates(basis: Basis, index: int) -> Coordinates:
    """Those of target `index`, by QR decomposition of its B and its transposed A in float64."""
    module = basis.targets[index].module
    left = torch.linalg.qr(basis.b(module).double(), mode="r").R
    right = torch.linalg.qr(basis.a(module).double().t(), mode="r").R.t()
    return Coordinates(left, right)

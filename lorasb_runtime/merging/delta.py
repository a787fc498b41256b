"""What is added to a target's weight: one small protocol, as factors or as a full matrix."""

from collections.abc import Callable
from typing import Protocol

import torch

from lorasb_runtime.ops.core_matmul import dense_delta
from lorasb_runtime.storage.basis_file import Basis


class Delta(Protocol):
    """One target's delta [out, in], handed out in blocks so that it need never be whole."""

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        """The delta's rows `rows` (of out) in the columns `columns` (of in); not to be changed."""
        ...


# From a target's index in the basis, and the dtype in which it will be added (float32; float64
# for float64 weights), to its delta in that dtype. Called once for each target, when its turn has
# come, and by several threads at once.
DeltaOf = Callable[[int, torch.dtype], Delta]


class CoreDelta:
    """B @ R @ A in factors: b [out, r], scaled_core [r, r] from `scale_core`, a [r, in]."""

    def __init__(self, b: torch.Tensor, scaled_core: torch.Tensor, a: torch.Tensor) -> None:
        self._b = b
        self._core = scaled_core
        self._a = a

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        return dense_delta(self._b[rows], self._core, self._a[:, columns])


class DenseDelta:
    """A full matrix [out, in]."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._matrix[rows, columns]


def core_deltas(
    basis: Basis, scaled_cores: torch.Tensor, device: torch.device | None = None
) -> DeltaOf:
    """The deltas of one vector of cores [D] in any float dtype, from `scale_core`."""

    def make(index: int, dtype: torch.dtype) -> Delta:
        module = basis.targets[index].module
        b, a = basis.b(module).to(device, dtype), basis.a(module).to(device, dtype)
        return CoreDelta(b, basis.core(scaled_cores, index).to(device, dtype), a)

    return make

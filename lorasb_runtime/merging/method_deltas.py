"""What a merge method adds to each target's weight: from adapters to deltas."""

import threading
from collections.abc import Iterator, Sequence

import torch

from lorasb_runtime.merging import MergeMethod, Part, Space
from lorasb_runtime.merging.combine import (
    arrange,
    as_part,
    check_bases,
    check_range,
    exact_cores,
    target_part,
)
from lorasb_runtime.merging.delta import Delta, DeltaOf, DenseDelta, core_deltas
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.ops.core_matmul import dense_delta, scale_core
from lorasb_runtime.storage.basis_file import Basis


def method_deltas(
    adapters: Sequence[WeightedAdapter], basis: Basis, method: MergeMethod
) -> DeltaOf:
    """The deltas that a method makes of adapters of this basis.

    A method on cores combines them in float64 here, and the scaled result is rounded once, to the
    dtype of the addition. A method on deltas works on one target at a time, when its turn has
    come, in float32: it needs room for a few more [out, in] than there are adapters. Raises
    InputError for another number of adapters or other weights than the method takes and for cores
    out of float32's range, and BasisMismatchError or FileFormatError for an adapter that is not of
    this basis.
    """
    check_bases(adapters, basis)
    arranged = arrange(adapters, method)
    if method.space is Space.DELTA:
        parts = [as_part(item) for item in arranged]
        method(part.with_tensor(torch.zeros(1)) for part in parts)  # refuses wrong weights now
        return _DenseDeltas(parts, basis, method)
    scaled = scale_core(exact_cores(arranged, method, basis), basis.scaling)
    check_range(scaled.float())
    return core_deltas(basis, scaled)


class _DenseDeltas:
    """Makes one target's merged delta at a time, also where several threads ask."""

    def __init__(self, parts: Sequence[Part], basis: Basis, method: MergeMethod) -> None:
        self._parts = parts
        self._basis = basis
        self._method = method
        self._lock = threading.Lock()  # memory for one target's deltas, not for one in each thread

    def __call__(self, index: int, dtype: torch.dtype) -> Delta:
        with self._lock:
            merged = self._method(self._deltas(index))
        return DenseDelta(merged.to(dtype))

    def _deltas(self, index: int) -> Iterator[Part]:
        """Each adapter's delta [out, in] in float32, made when it is asked for."""
        module = self._basis.targets[index].module
        b, a = self._basis.b(module), self._basis.a(module)
        for part in self._parts:
            core = target_part(part, self._basis, index)
            scaled = scale_core(core.tensor, self._basis.scaling).float()
            yield core.with_tensor(dense_delta(b, scaled, a))

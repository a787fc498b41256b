"""Combining: many adapters of one basis into one vector of cores."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging import METHODS, MergeMethod, Part, Space
from lorasb_runtime.merging.coordinates import orthonormal_coordinates
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.ops.rounding import round_once
from lorasb_runtime.storage.adapter_file import Adapter, check_basis, serialize_adapter, version_of
from lorasb_runtime.storage.basis_file import Basis


def check_bases(adapters: Sequence[WeightedAdapter], basis: Basis) -> None:
    """Raises BasisMismatchError or FileFormatError for an adapter that is not of this basis."""
    for item in adapters:
        check_basis(item.adapter, basis, f"adapter {item.adapter.name!r}")


def exact_cores(
    arranged: Sequence[WeightedAdapter], method: MergeMethod, basis: Basis | None = None
) -> torch.Tensor:
    """What the method makes of adapters from `arrange`: cores [D] in float64, not scaled.

    Raises InputError for a method on deltas, and without a basis where the method needs one.
    """
    if method.space is Space.DELTA:
        others = [name for name, other in METHODS.items() if other.space is not Space.DELTA]
        raise InputError(
            f"method {method.name}: found one that works on whole deltas and leaves the basis, "
            f"expected one that makes an adapter: {', '.join(others)}; or use `lorasb merge`"
        )
    parts = [as_part(item) for item in arranged]
    if method.space is Space.CORES:
        return method(parts)
    if basis is None:
        raise InputError(f"method {method.name}: found no basis, expected the adapters' own")
    flat = [_combine_target(parts, method, basis, i).flatten() for i in range(len(basis.targets))]
    return torch.cat(flat)


def arrange(adapters: Sequence[WeightedAdapter], method: MergeMethod) -> list[WeightedAdapter]:
    """The adapters as the method takes them: as given if it is ordered, else in digest order.

    Raises InputError for another number of them than the method takes.
    """
    arranged = list(adapters) if method.ordered else in_digest_order(adapters)
    method.check_count(len(arranged))
    return arranged


def as_part(item: WeightedAdapter) -> Part:
    """All of an adapter's cores, [D] in float64, with its weight."""
    return Part(item.adapter.cores.double(), item.weight, version=find_version(item.adapter))


def target_part(part: Part, basis: Basis, index: int) -> Part:
    """Target `index`'s share of `as_part`: its core [r, r]."""
    core = basis.core(part.tensor, index)
    return dataclasses.replace(part, tensor=core, module=basis.targets[index].module)


def _combine_target(
    parts: Sequence[Part], method: MergeMethod, basis: Basis, index: int
) -> torch.Tensor:
    cores = [target_part(part, basis, index) for part in parts]
    if method.space is Space.CORE:
        return method(cores)
    coordinates = orthonormal_coordinates(basis, index)
    moved = [p.with_tensor(coordinates.enter(p.tensor)) for p in cores]
    return coordinates.leave(method(moved))


def round_cores(cores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cores rounded once. Raises InputError when they leave the range of `dtype`."""
    rounded = round_once(cores, dtype)
    check_range(rounded)
    return rounded


def check_range(rounded: torch.Tensor) -> None:
    """Raises InputError where rounding to this dtype has left Inf or NaN."""
    if not torch.isfinite(rounded).all():
        raise InputError(
            f"the cores do not fit {str(rounded.dtype).removeprefix('torch.')}: found Inf or NaN, "
            "expected finite numbers"
        )


def in_digest_order(adapters: Sequence[WeightedAdapter]) -> list[WeightedAdapter]:
    """One entry for each version, with the sum of its weights, in the order of the versions.

    That is the order in which sums are taken and recorded. Of a version with several names the
    first in alphabetical order is kept.
    """
    same: dict[str, list[WeightedAdapter]] = {}
    for item in adapters:
        same.setdefault(find_version(item.adapter), []).append(item)
    return [
        WeightedAdapter(
            min((item.adapter for item in items), key=lambda adapter: adapter.name),
            math.fsum(item.weight for item in items),
        )
        for _, items in sorted(same.items())
    ]


def find_version(adapter: Adapter) -> str:
    """The adapter's version, also of one that has not been a file yet."""
    return adapter.version or version_of(serialize_adapter(adapter))

"""Combining: many adapters of one basis into one vector of cores."""

import math
from collections.abc import Sequence

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging.weighted import CombineCores, WeightedAdapter
from lorasb_runtime.ops.rounding import round_once
from lorasb_runtime.storage.adapter_file import Adapter, check_basis, serialize_adapter, version_of
from lorasb_runtime.storage.basis_file import Basis


def combine_adapters(
    adapters: Sequence[WeightedAdapter],
    basis: Basis,
    method: CombineCores,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One vector of cores [D], not scaled: combined in float64, then rounded once to `dtype`.

    The order in which the adapters are given does not change a bit of it. Raises InputError
    without adapters or when the result leaves the range of `dtype`, and BasisMismatchError or
    FileFormatError for an adapter that is not of this basis.
    """
    if not adapters:
        raise InputError("found no adapters to combine, expected at least one")
    for item in adapters:
        check_basis(item.adapter, basis, f"adapter {item.adapter.name!r}")
    return round_cores(method(in_digest_order(adapters)), dtype)


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
        same.setdefault(_version(item.adapter), []).append(item)
    return [
        WeightedAdapter(
            min((item.adapter for item in items), key=lambda adapter: adapter.name),
            math.fsum(item.weight for item in items),
        )
        for _, items in sorted(same.items())
    ]


def _version(adapter: Adapter) -> str:
    return adapter.version or version_of(serialize_adapter(adapter))

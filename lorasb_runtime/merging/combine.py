"""Combining: many adapters of one basis into one vector of cores."""

from collections.abc import Sequence

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging.weighted import CombineCores, WeightedAdapter
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
    cores = method(in_digest_order(adapters)).to(dtype)
    if not torch.isfinite(cores).all():
        raise InputError(
            f"the combined cores do not fit {str(dtype).removeprefix('torch.')}: "
            "found Inf or NaN, expected finite numbers; use smaller weights"
        )
    return cores


def in_digest_order(adapters: Sequence[WeightedAdapter]) -> list[WeightedAdapter]:
    """By adapter version, then weight: the order in which sums are taken and recorded."""
    return sorted(adapters, key=lambda item: (_version(item.adapter), item.weight))


def _version(adapter: Adapter) -> str:
    return adapter.version or version_of(serialize_adapter(adapter))

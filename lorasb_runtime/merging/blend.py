"""Blends: many adapters as one, as a file of its own or, the weighted sum, ready for a slot."""

import hashlib
import struct
from collections.abc import Sequence

import torch

from lorasb_runtime.errors import BasisMismatchError, FileFormatError
from lorasb_runtime.merging import MergeMethod, find_method
from lorasb_runtime.merging.combine import arrange, exact_cores, round_cores
from lorasb_runtime.merging.provenance import describe_adapters, describe_method
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.storage.adapter_file import Adapter, check_basis
from lorasb_runtime.storage.basis_file import Basis

LINEAR = find_method("linear").with_options({})
DOMAIN = b"lorasb-blend-1\0"  # no file of ours begins so: a blend's digest is no file's


def blend_adapters(
    adapters: Sequence[WeightedAdapter],
    name: str,
    dtype: torch.dtype = torch.float32,
    method: MergeMethod = LINEAR,
    basis: Basis | None = None,
) -> Adapter:
    """What the method makes of the adapters, as one: in float64, then rounded once to `dtype`.

    Its info records the parts, the method and its options. `basis` is the adapters', which every
    method but the sums needs. Raises BasisMismatchError for adapters of different bases, and
    InputError for a wrong number of adapters, for a method that makes no adapter, without a basis
    where one is needed, and when the result leaves the range of `dtype`.
    """
    parts = arrange(adapters, method)
    first = adapters[0].adapter
    for item in adapters[1:]:
        _check_same_basis(first, item.adapter)
    if basis is not None:
        check_basis(first, basis, f"adapter {first.name!r}")
    known = (part.adapter.base_model for part in parts)
    return Adapter(
        cores=round_cores(exact_cores(parts, method, basis), dtype),
        basis=first.basis,
        name=name,
        base_model=next((model for model in known if model is not None), None),
        info={"blend": describe_adapters(parts), **describe_method(method)},
    )


def exact_blend(adapters: Sequence[WeightedAdapter]) -> torch.Tensor:
    """The sum of weight * cores, [D] in float64, which a slot scales and rounds once."""
    return exact_cores(arrange(adapters, LINEAR), LINEAR)


def blend_version(weights: dict[str, float]) -> str:
    """What identifies a blend: a digest (hex) of the versions and what each is multiplied by."""
    digest = hashlib.sha256(DOMAIN)
    for version, weight in sorted(weights.items()):
        digest.update(version.encode() + struct.pack("<d", weight))
    return digest.hexdigest()


def _check_same_basis(first: Adapter, other: Adapter) -> None:
    if other.basis != first.basis:
        raise BasisMismatchError(
            f"adapter {other.name!r}: found one for basis {other.basis}, expected "
            f"{first.basis} as of adapter {first.name!r}"
        )
    if other.cores.shape != first.cores.shape:
        raise FileFormatError(
            f"adapter {other.name!r}",
            f"{other.cores.numel()} core numbers",
            f"{first.cores.numel()} as of adapter {first.name!r}",
        )

"""Blends: the weighted sum of adapters, as a file of its own or ready for a slot."""

import dataclasses
import hashlib
import math
import struct
from collections.abc import Sequence

import torch

from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError
from lorasb_runtime.merging import linear
from lorasb_runtime.merging.combine import in_digest_order, round_cores
from lorasb_runtime.merging.provenance import describe_adapters
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.storage.adapter_file import Adapter

DOMAIN = b"lorasb-blend-1\0"  # no file of ours begins so: a blend's digest is no file's


def blend_adapters(
    adapters: Sequence[WeightedAdapter], name: str, dtype: torch.dtype = torch.float32
) -> Adapter:
    """The sum of weight * cores as an adapter: taken in float64, then rounded once to `dtype`.

    Its info records the parts. Raises BasisMismatchError for adapters of different bases,
    InputError without adapters or when the sum leaves the range of `dtype`.
    """
    if not adapters:
        raise InputError("found no adapters to blend, expected at least one")
    first = adapters[0].adapter
    for item in adapters[1:]:
        _check_same_basis(first, item.adapter)
    parts = in_digest_order(adapters)
    known = (part.adapter.base_model for part in parts)
    return Adapter(
        cores=round_cores(linear.combine(parts), dtype),
        basis=first.basis,
        name=name,
        base_model=next((model for model in known if model is not None), None),
        info={"blend": describe_adapters(parts)},
    )


def exact_blend(adapters: Sequence[WeightedAdapter]) -> torch.Tensor:
    """The sum of weight * cores, [D] in float64, which a slot scales and rounds once."""
    return linear.combine(in_digest_order(adapters))


def blend_version(weights: dict[str, float]) -> str:
    """What identifies a blend: a digest (hex) of the versions and what each is multiplied by."""
    digest = hashlib.sha256(DOMAIN)
    for version, weight in sorted(weights.items()):
        digest.update(version.encode() + struct.pack("<d", weight))
    return digest.hexdigest()


def normalized(adapters: Sequence[WeightedAdapter]) -> list[WeightedAdapter]:
    """The same adapters with weights that sum to 1. Raises InputError where they sum to 0."""
    total = math.fsum(item.weight for item in adapters)
    if total == 0:
        raise InputError("weights: found a sum of 0, expected another one to normalize by")
    return [dataclasses.replace(item, weight=item.weight / total) for item in adapters]


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

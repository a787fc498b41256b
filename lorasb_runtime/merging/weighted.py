"""Adapters with weights, as users name them and as merge methods take them."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.storage.adapter_file import Adapter, load_adapter
from lorasb_runtime.storage.basis_file import Basis

LARGEST_WEIGHT = torch.finfo(torch.float32).max  # so that sums of weights stay in float64's range


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter of the basis at hand and what it is multiplied by; never normalised."""

    adapter: Adapter
    weight: float = 1.0


def load_weighted(text: str, basis: Basis | None = None) -> WeightedAdapter:
    """Read `FILE` or `FILE=WEIGHT`; a file whose whole name holds the `=` is found first.

    Raises InputError for a weight that is no number of float32's range, and what `load_adapter`
    raises.
    """
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).is_file():
        return WeightedAdapter(load_adapter(text, basis))
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not abs(value) <= LARGEST_WEIGHT:
        raise InputError(
            f"{text}: found weight {weight!r}, expected FILE=WEIGHT, a finite number of float32's "
            "range"
        )
    return WeightedAdapter(load_adapter(path, basis), value)

"""`linear`: the weighted sum of cores, which is exactly the weighted sum of the deltas."""

import math
from collections.abc import Iterable

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging.method import Part


def merge(parts: Iterable[Part], *, normalize: bool = False) -> torch.Tensor:
    """Sum of weight * tensor in the order given; with `normalize` divided by the sum of weights.

    Raises InputError where weights to normalize by sum to 0.
    """
    rest = iter(parts)
    first = next(rest)
    weights = [first.weight]
    total = first.weighted  # not zeros: 0.0 + -0.0 would lose a sign
    for part in rest:
        total += part.weighted
        weights.append(part.weight)
    if not normalize:
        return total
    divisor = math.fsum(weights)
    if divisor == 0:
        raise InputError("weights: found a sum of 0, expected another one to normalize by")
    return total.div_(divisor)

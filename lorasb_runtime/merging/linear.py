"""`linear`: the weighted sum of cores, which is exactly the weighted sum of the deltas."""

from collections.abc import Sequence

import torch

from lorasb_runtime.merging.weighted import WeightedAdapter


def combine(adapters: Sequence[WeightedAdapter]) -> torch.Tensor:
    """Sum of weight * cores in the order given, [D] in float64; weights are taken as they are."""
    terms = (item.weight * item.adapter.cores.double() for item in adapters)
    total = next(terms)  # not zeros: 0.0 + -0.0 would lose a sign
    for term in terms:
        total = total + term
    return total

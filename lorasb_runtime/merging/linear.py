"""`linear`: the weighted sum of cores, which is exactly the weighted sum of the deltas."""

from collections.abc import Sequence

import torch

from lorasb_runtime.merging.weighted import WeightedAdapter


def combine(adapters: Sequence[WeightedAdapter]) -> torch.Tensor:
    """Sum of weight * cores, [D] in float64.

    Summed in the order of the adapter versions (then weights), so that the order in which they
    are named does not change a bit. Weights are taken as they are.
    """
    ordered = sorted(adapters, key=lambda w: (w.adapter.version, w.weight))
    total = torch.zeros_like(ordered[0].adapter.cores, dtype=torch.float64)
    for item in ordered:
        total += item.weight * item.adapter.cores.double()
    return total

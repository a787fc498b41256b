"""Keeping a share of a tensor's entries: the largest (TIES), or random ones (DARE)."""

import numpy as np
import torch


def trim(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The `density * numel` entries of largest magnitude, one at least; zeros elsewhere.

    Of entries of one magnitude the first, row by row, are kept.
    """
    total = tensor.numel()
    count = max(1, int(density * total))
    if count == total:
        return tensor
    flat = tensor.flatten()
    sizes = flat.abs()
    least = float(np.partition(sizes.numpy(), total - count)[total - count])
    kept = sizes > least
    at_edge = (sizes == least).nonzero().flatten()
    kept[at_edge[: count - int(kept.sum())]] = True
    return torch.where(kept, flat, 0).view_as(tensor)


def drop(
    tensor: torch.Tensor, density: float, rescale: bool, generator: torch.Generator
) -> torch.Tensor:
    """Each entry kept with probability `density`, else 0; with `rescale` divided by `density`.

    One float32 random number is drawn for each entry, row by row, whatever the tensor's dtype.
    """
    if density == 1.0:
        return tensor
    kept = torch.rand(tensor.shape, generator=generator) < density
    left = torch.where(kept, tensor, 0)
    return left.div_(density) if rescale else left

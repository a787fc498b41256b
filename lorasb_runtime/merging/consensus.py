"""TIES' second and third step (arXiv 2306.01708): elect a sign, average those that agree."""

from collections.abc import Sequence

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging.method import Part
from lorasb_runtime.merging.options import MajoritySign

# Elected and averaged at a time: few enough entries for the processor's cache.
BLOCK_ELEMENTS = 1 << 16


def average_agreeing(
    parts: Sequence[Part], majority_sign: MajoritySign, normalize: bool
) -> torch.Tensor:
    """For each entry the mean of those weight * tensor that have the elected sign.

    The sign is that of their sum (`total`) or of the sum of their signs (`frequency`), positive
    where that is 0. The mean divides by how many agree; with `normalize` by the sum of their
    weights, which must then be above 0 (else InputError). An entry of 0 never agrees.
    """
    if normalize and any(part.weight <= 0 for part in parts):
        found = min(part.weight for part in parts)
        raise InputError(f"normalize: found weight {found}, expected weights above 0")
    merged = torch.empty(parts[0].tensor.shape, dtype=parts[0].tensor.dtype)
    flat = [part.with_tensor(part.tensor.flatten()) for part in parts]
    for start in range(0, merged.numel(), BLOCK_ELEMENTS):
        block = slice(start, start + BLOCK_ELEMENTS)
        here = [part.with_tensor(part.tensor[block]) for part in flat]
        merged.view(-1)[block] = _average(here, _elect(here, majority_sign), normalize)
    return merged


def _elect(parts: Sequence[Part], majority_sign: MajoritySign) -> torch.Tensor:
    """Where the elected sign is positive."""
    votes = torch.zeros_like(parts[0].tensor)
    for part in parts:
        votes += part.weighted if majority_sign == "total" else part.weighted.sign_()
    return votes >= 0


def _average(parts: Sequence[Part], positive: torch.Tensor, normalize: bool) -> torch.Tensor:
    total = torch.zeros_like(parts[0].tensor)
    divisor = torch.zeros_like(total)
    for part in parts:
        share = part.weighted
        agrees = torch.where(positive, share > 0, share < 0)
        total += torch.where(agrees, share, 0)
        divisor += agrees.to(divisor.dtype).mul_(part.weight if normalize else 1)
    return total.div_(torch.where(divisor == 0, 1, divisor))

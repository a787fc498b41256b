"""`dare-ties`: DARE's drop and rescale (arXiv 2311.03099) in place of TIES' trim (2306.01708)."""

from collections.abc import Iterable

import torch

from lorasb_runtime.merging.consensus import average_agreeing
from lorasb_runtime.merging.method import Part
from lorasb_runtime.merging.options import Density, MajoritySign, Seed
from lorasb_runtime.merging.sparsify import drop


def merge(
    parts: Iterable[Part],
    *,
    density: Density,
    seed: Seed = 0,
    rescale: bool = True,
    majority_sign: MajoritySign = "total",
    lambda_: float = 1.0,
    normalize: bool = False,
) -> torch.Tensor:
    """lambda * the mean of the agreeing entries of what is left of each tensor.

    density, seed, rescale: see `dare-linear`. majority_sign, normalize: see `average_agreeing`.
    """
    left = [p.with_tensor(drop(p.tensor, density, rescale, p.generator(seed))) for p in parts]
    return average_agreeing(left, majority_sign, normalize).mul_(lambda_)

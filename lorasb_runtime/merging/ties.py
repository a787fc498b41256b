"""`ties` (arXiv 2306.01708): trim, elect a sign, merge those that agree.

On cores it is `core-ties`.
"""

from collections.abc import Iterable

import torch

from lorasb_runtime.merging.consensus import average_agreeing
from lorasb_runtime.merging.method import Part
from lorasb_runtime.merging.options import Density, MajoritySign
from lorasb_runtime.merging.sparsify import trim


def merge(
    parts: Iterable[Part],
    *,
    density: Density = 0.2,
    majority_sign: MajoritySign = "total",
    lambda_: float = 1.0,
    normalize: bool = False,
) -> torch.Tensor:
    """lambda * the mean of the agreeing entries of the trimmed tensors.

    density: the share of each tensor's entries that is kept, 0.2 as in the paper; the paper
    trims all of a model's entries together. majority_sign, normalize: see `average_agreeing`.
    """
    trimmed = [p.with_tensor(trim(p.tensor, density)) for p in parts]
    return average_agreeing(trimmed, majority_sign, normalize).mul_(lambda_)

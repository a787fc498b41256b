"""`dare-linear` (arXiv 2311.03099): drop and rescale, then the weighted sum.

On cores it is `core-dare`.
"""

from collections.abc import Iterable

import torch

from lorasb_runtime.merging import task_arithmetic
from lorasb_runtime.merging.method import Part
from lorasb_runtime.merging.options import Density, Seed
from lorasb_runtime.merging.sparsify import drop


def merge(
    parts: Iterable[Part],
    *,
    density: Density,
    seed: Seed = 0,
    rescale: bool = True,
    lambda_: float = 1.0,
    normalize: bool = False,
) -> torch.Tensor:
    """lambda * sum of weight * what is left of each tensor.

    density: the chance of an entry to be kept, 1 - p in the paper. rescale: divide what is left
    by it. What is dropped depends on seed, module and the adapter's version alone.
    """
    left = (p.with_tensor(drop(p.tensor, density, rescale, p.generator(seed))) for p in parts)
    return task_arithmetic.merge(left, lambda_=lambda_, normalize=normalize)

"""`task-arithmetic` (arXiv 2212.04089): the sum of task vectors times one common factor."""

from collections.abc import Iterable

import torch

from lorasb_runtime.merging import linear
from lorasb_runtime.merging.method import Part


def merge(parts: Iterable[Part], *, lambda_: float = 1.0, normalize: bool = False) -> torch.Tensor:
    """lambda * sum of weight * tensor; a negative weight negates a task, as in the paper."""
    return linear.merge(parts, normalize=normalize).mul_(lambda_)

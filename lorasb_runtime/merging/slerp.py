"""`slerp`: from one delta to another along the arc between them, as mergekit defines it."""

import math
from collections.abc import Iterable

import torch

from lorasb_runtime.merging.method import Part
from lorasb_runtime.merging.options import Share

COLLINEAR = 0.9995  # mergekit's dot_threshold: from this cosine on, the straight line is taken


def merge(parts: Iterable[Part], *, t: Share = 0.5) -> torch.Tensor:
    """The point at `t` on the way from the first of two weight * tensor (0) to the second (1)."""
    first, second = (part.weighted for part in parts)
    a, b = _coefficients(_cosine(first, second), t)
    return a * first + b * second


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """0 where one of the two has no direction."""
    units = []
    for vector in (first.double().flatten(), second.double().flatten()):
        length = torch.linalg.vector_norm(vector)
        units.append(vector / length if length > 0 else vector)
    return max(-1.0, min(1.0, torch.dot(*units).item()))


def _coefficients(cosine: float, t: float) -> tuple[float, float]:
    if abs(cosine) > COLLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

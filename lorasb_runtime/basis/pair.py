"""What a basis method makes of one module."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BasisPair:
    """b: [out, r], a: [r, in], r0: [r, r] or None; float32. The basis' scaling is 1."""

    b: torch.Tensor
    a: torch.Tensor
    r0: torch.Tensor | None = None

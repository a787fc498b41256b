"""Learning rates: their course over the steps, and their scale for each target module."""

import math

from lorasb_runtime.storage.basis_file import Basis

WARMUP_SHARE = 0.1
FIRST_RATE = 1 / 32


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then a cosine down towards zero.

    The first step's rate is FIRST_RATE of the peak however few steps there are, because R0 is
    multiplied by it: a start at the full rate would undo the model.
    """
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (FIRST_RATE + (1 - FIRST_RATE) * step / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def rate_factor(basis: Basis, module: str) -> float:
    """What the rate of one core is multiplied by so that its steps in the delta have one size.

    1 for an orthonormal pair (LoRA-SB); for LoRA-XS, whose A carries the singular values, their
    inverse root mean square.
    """
    rows = basis.a(module).pow(2).sum(1).mean().sqrt()
    columns = basis.b(module).pow(2).sum(0).mean().sqrt()
    return 1.0 / float(abs(basis.scaling) * rows * columns)

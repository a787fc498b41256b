"""How near a result must be to the exact one."""

import torch


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, units: int = 4) -> bool:
    """Within `units` roundings of the largest value."""
    assert found.dtype == dtype
    allowed = units * torch.finfo(dtype).eps * expected.abs().max()
    return bool((found.double() - expected).abs().max() <= allowed)

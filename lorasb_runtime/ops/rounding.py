"""Rounding float64 numbers once to a narrower dtype."""

import torch


def round_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest number of `dtype` for each of x, ties to even.

    torch goes from float64 to a 16-bit dtype by way of float32 and so rounds twice; here the way
    station is rounded to odd, which the second rounding cannot mistake for a tie.
    """
    if x.dtype != torch.float64 or dtype.itemsize > 2:
        return x.to(dtype)
    near = x.float()
    bits = near.view(torch.int32)
    step = (near.double().abs() < x.abs()).int() - (near.double().abs() > x.abs()).int()
    odd = bits + torch.where(bits & 1 == 0, step, 0)
    return odd.view(torch.float32).to(dtype)

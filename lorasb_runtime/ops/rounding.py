"""Rounding numbers once to a narrower dtype: to the nearest, or to either neighbour by chance."""

import numpy as np
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


def round_stochastically(
    x: torch.Tensor, dtype: torch.dtype, generator: np.random.Generator
) -> torch.Tensor:
    """One of the two numbers of a 16-bit `dtype` next to each of x, float32 or float64.

    The nearer one is the likelier, so that the expected result is x, to 2**-17 of a step. Past the
    largest number of `dtype` comes Inf.
    """
    near = x.to(dtype)
    bits = near.view(torch.int16)
    gap = x - near.to(x.dtype)
    # Away from zero the bits go up by one, towards it down; from zero itself to the smallest number
    # with the sign of x.
    outward = (gap < 0) == (bits < 0)
    zero = torch.where(x < 0, -0x7FFF, 1).short()
    step = torch.where(outward, 1, -1).short()
    other = torch.where(bits & 0x7FFF == 0, zero, bits + step)
    width = other.view(dtype).to(x.dtype) - near.to(x.dtype)
    drawn = torch.from_numpy(generator.integers(0, 1 << 16, x.shape, np.uint16))
    chosen = torch.where((drawn.to(x.dtype) + 0.5) / (1 << 16) < gap / width, other, bits)
    return chosen.view(dtype)

"""Rounding numbers once to a narrower dtype: to the nearest, or to either neighbour by chance."""

import numpy as np
import torch

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    drawn = torch.from_numpy(generator.integers(0, 1 << 16, x.shape, np.uint16))
    if dtype == torch.bfloat16 and x.dtype == torch.float32:  # its upper half, and a carry
        bits = drawn.to(torch.int32).add_(x.view(torch.int32)).bitwise_and_(-1 << 16)
        return bits.view(torch.float32).to(dtype)
    near = x.to(dtype)
    gap = x - near.to(x.dtype)
    other = other_neighbour(near, gap)
    width = other.to(x.dtype) - near.to(x.dtype)
    return torch.where((drawn.to(x.dtype) + 0.5) / (1 << 16) < gap / width, other, near)


def other_neighbour(near: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """Where x = near + gap lies between two numbers of near's dtype, the other one of them."""
    away, towards = neighbours(near)
    outward = torch.where(near == 0, gap > 0, (gap < 0) == torch.signbit(near))
    return torch.where(outward, away, towards)


def neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next number of x's dtype away from zero and towards zero; of zero, those above and below.

    As floating-point numbers count up by their bits, the sign apart.
    """
    integers = INTEGERS[x.element_size()]
    bits, sign = x.view(integers), torch.iinfo(integers).min
    above = torch.ones_like(bits)
    zero = x == 0
    away = torch.where(zero, above, bits + 1)
    towards = torch.where(zero, above + sign, bits - 1)
    return away.view(x.dtype), towards.view(x.dtype)

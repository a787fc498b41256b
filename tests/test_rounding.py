"""Rounding by chance, and the neighbours of a number."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_runtime.ops.rounding import neighbours, round_stochastically

NARROW = [torch.bfloat16, torch.float16]
WIDE = [torch.float32, torch.float64]
# Normal and subnormal numbers of both dtypes, their bounds, and zeros of either sign.
VALUES = [0.1, -0.1, 1.0, -3.0, 1.001953, 6e-8, -6.1e-5, 1e-40, -3e-9, 0.0, -0.0, 65000.0, 7e4]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("value", VALUES)
def test_rounding_by_chance_takes_both_sides_as_often_as_it_must(
    dtype: torch.dtype, wide: torch.dtype, value: float
) -> None:
    x = torch.full((40_000,), value, dtype=wide)
    rounded = round_stochastically(x, dtype, rng()).double()
    sides = rounded.unique().tolist()
    exact = x[0].item()
    if exact in sides:
        assert sides == [exact]
    elif exact > torch.finfo(dtype).max:
        assert sides == [float("inf")]
    elif len(sides) == 1:  # far under the smallest number
        assert sides == [0.0]
        assert 0 < exact < 1e-30
    else:
        low, high = sides
        assert low < exact < high
        step = torch.tensor([low], dtype=torch.float64).to(dtype)
        assert high in [n.item() for n in neighbours(step)]
        share = (exact - low) / (high - low)
        assert (rounded == high).double().mean().item() == pytest.approx(share, abs=0.012)


@given(st.floats(width=16, allow_nan=False, allow_infinity=False))
def test_neighbours_are_the_next_numbers_on_either_side(value: float) -> None:
    x = torch.tensor([value], dtype=torch.float16)
    away, towards = (n.item() for n in neighbours(x))
    below, above = (
        float(np.nextafter(np.float16(value), np.float16(end))) for end in (-np.inf, np.inf)
    )
    assert {away, towards} == {below, above}
    assert abs(away) >= abs(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_neighbours_of_every_width_are_those_of_torch(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    away, towards = neighbours(x)
    assert torch.equal(away, torch.nextafter(x, x.sign() * torch.inf))
    assert torch.equal(towards, torch.nextafter(x, torch.zeros_like(x)))


def test_numbers_that_the_dtype_has_are_never_moved() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for dtype in NARROW:
        narrow = x.to(dtype)
        for wide in WIDE:
            assert torch.equal(round_stochastically(narrow.to(wide), dtype, rng()), narrow)

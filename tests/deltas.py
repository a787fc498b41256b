"""Low-rank deltas in families, as users' LoRAs of one model are."""

import torch

from lorasb_runtime.basis.stack import LowRank


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    return q


def families(
    count: int,
    shape: tuple[int, int],
    rank: int,
    *,
    kinds: int = 1,
    width: int = 12,
    noise: float = 0.0,
    seed: int = 0,
) -> list[LowRank]:
    """`count` deltas [out, in] of `rank`; delta i is of family i % kinds.

    A family's deltas lie in its own `width` directions on each side, but for noise of this
    strength. Their norms differ widely.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [[orthonormal(size, width, generator) for size in shape] for _ in range(kinds)]
    deltas = []
    for index in range(count):
        factors = []
        for side, size in zip(sides[index % kinds], shape, strict=True):
            mixed = side @ torch.randn(width, rank, generator=generator) / width**0.5
            factors.append(mixed + noise * torch.randn(size, rank, generator=generator) / size**0.5)
        loudness = 10 ** float(torch.randn(1, generator=generator))
        deltas.append(LowRank(factors[0], factors[1].t().contiguous(), loudness))
    return deltas


def dense(delta: LowRank) -> torch.Tensor:
    """The delta as a full matrix in float64."""
    return delta.scaling * (delta.b.double() @ delta.a.double())

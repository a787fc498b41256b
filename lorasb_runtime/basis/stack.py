"""Many low-rank deltas of one module, held in factors; deltas of equal rank are one batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

VANISHED = 1e-7
PIECE = 64  # deltas that are widened to float64 at once


@dataclass(frozen=True)
class LowRank:
    """One delta, scaling * b @ a: b [out, k], a [k, in], in any float dtype; k may be 0."""

    b: torch.Tensor
    a: torch.Tensor
    scaling: float = 1.0


@dataclass(frozen=True)
class Batch:
    """n deltas of one rank k, each gain * left.T @ right.

    left: [n, k, out], right: [n, k, in], float32, scaled by powers of two (so nothing is rounded)
    until left.T @ right has a norm near 1. weights: [n] float64, 1 / |left.T @ right|^2. gain: [n]
    float64. places: [n] int64, where the deltas lie in the stack.
    """

    left: torch.Tensor
    right: torch.Tensor
    weights: torch.Tensor
    gain: torch.Tensor
    places: torch.Tensor

    @property
    def mirrored(self) -> "Batch":
        """The transposed deltas."""
        return Batch(self.right, self.left, self.weights, self.gain, self.places)

    def chosen(self, mask: torch.Tensor) -> "Batch":
        """The deltas that `mask` [count of the stack] chooses; their places stay."""
        kept = mask[self.places]
        parts = (self.left, self.right, self.weights, self.gain, self.places)
        return Batch(*(part[kept] for part in parts))

    def pieces(self) -> Iterator["Batch"]:
        """The same deltas, at most PIECE at a time, as views."""
        parts = (self.left, self.right, self.weights, self.gain, self.places)
        yield from (Batch(*piece) for piece in zip(*(p.split(PIECE) for p in parts), strict=True))


@dataclass(frozen=True)
class Stack:
    """The deltas of one module; `count` places, of which those without a delta have no batch."""

    batches: tuple[Batch, ...]
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (out, in) of every delta."""
        return self.batches[0].left.shape[2], self.batches[0].right.shape[2]

    @property
    def mirrored(self) -> "Stack":
        return Stack(tuple(batch.mirrored for batch in self.batches), self.count)

    def pieces(self) -> Iterator[Batch]:
        """All deltas, at most PIECE of one rank at a time."""
        for batch in self.batches:
            yield from batch.pieces()

    def chosen(self, mask: torch.Tensor) -> "Stack":
        """Only the deltas that `mask` [count] chooses; places and count stay."""
        batches = (batch.chosen(mask) for batch in self.batches)
        return Stack(tuple(b for b in batches if len(b.places)), self.count)


def make_stack(deltas: Sequence[LowRank | None]) -> Stack:
    """A stack of deltas of one shape; None and deltas of zero leave their places empty.

    Factors whose product is mere rounding, having cancelled to under VANISHED of its size, are a
    delta of zero.
    """
    by_rank: dict[int, list[int]] = {}
    for place, delta in enumerate(deltas):
        if delta is not None and delta.a.shape[0]:
            by_rank.setdefault(delta.a.shape[0], []).append(place)
    batches = (_make_batch(deltas, by_rank[rank]) for rank in sorted(by_rank))
    return Stack(tuple(b for b in batches if len(b.places)), len(deltas))


def _make_batch(deltas: Sequence[LowRank | None], places: list[int]) -> Batch:
    members = [delta for place in places if (delta := deltas[place]) is not None]
    left = torch.empty(len(members), *members[0].b.t().shape)
    right = torch.empty(len(members), *members[0].a.shape)
    for index, delta in enumerate(members):
        left[index], right[index] = delta.b.t(), delta.a
    gain = torch.tensor([delta.scaling for delta in members], dtype=torch.float64)
    for side in (left, right):
        gain = gain * _scale_down(side, side.abs().amax(dim=(1, 2)))
    grams = _gram(left), _gram(right)
    squares = (grams[0] * grams[1]).sum(dim=(1, 2)).clamp_min(0.0)
    sizes = grams[0].diagonal(dim1=1, dim2=2).sum(1) * grams[1].diagonal(dim1=1, dim2=2).sum(1)
    moves = (squares > VANISHED**2 * sizes) & (gain != 0)
    scale = _scale_down(left, torch.where(moves, squares, 1.0).sqrt())
    squares = squares / scale.square()
    batch = Batch(left, right, 1 / squares, gain * scale, torch.tensor(places))
    mask = torch.zeros(len(deltas), dtype=torch.bool)
    mask[batch.places] = moves
    return batch if bool(moves.all()) else batch.chosen(mask)


def _scale_down(side: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Divide `side` [n, k, d] in place by powers of two just above `norms`; gives these [n]."""
    _, exponents = np.frexp(norms.numpy())
    scale = torch.from_numpy(np.ldexp(1.0, exponents))
    side.div_(scale[:, None, None].float())
    return scale


def _gram(side: torch.Tensor) -> torch.Tensor:
    """side @ side.T in float64, [n, k, k] from [n, k, d], without a wider copy of all of it."""
    parts = (part.double() for part in side.split(PIECE))
    return torch.cat([part @ part.transpose(1, 2) for part in parts])

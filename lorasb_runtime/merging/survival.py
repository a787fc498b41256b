"""The measure of what rounding left of a delta."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Survival:
    """What became of a delta in the stored weights: sums over entries.

    stored = W_out - W0, the change that really lies in the output. Where not all entries were
    measured, the sums are those of the measured ones times entries / measured.
    """

    weight: float = 0.0  # |W0|^2
    delta: float = 0.0  # |delta|^2
    overlap: float = 0.0  # <stored, delta>
    error: float = 0.0  # |stored - delta|^2
    entries: int = 0
    measured: int = 0

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(
            self.weight + other.weight,
            self.delta + other.delta,
            self.overlap + other.overlap,
            self.error + other.error,
            self.entries + other.entries,
            self.measured + other.measured,
        )

    def stand_for(self, entries: int) -> "Survival":
        """The sums as they would be of so many entries, of which these are a sample."""
        factor = entries / self.measured if self.measured else 1.0
        return Survival(
            factor * self.weight,
            factor * self.delta,
            factor * self.overlap,
            factor * self.error,
            entries,
            self.measured,
        )

    @property
    def ratio(self) -> float:
        """rms(delta) / rms(W0); 0 where there are no weights."""
        return (self.delta / self.weight) ** 0.5 if self.weight else 0.0

    @property
    def kept(self) -> float:
        """Share of the delta that survived the rounding; 1 for a delta of zero."""
        return self.overlap / self.delta if self.delta else 1.0

    @property
    def relative_error(self) -> float:
        """|stored - delta| / |delta|; 0 for a delta of zero."""
        return (self.error / self.delta) ** 0.5 if self.delta else 0.0


def measure(before: torch.Tensor, wanted: torch.Tensor, stored: torch.Tensor) -> Survival:
    """Survival of one block: W0, the delta and W_out in the dtype of the addition, contiguous.

    `stored` is overwritten. In float32 the two differences lose nothing that counts (W_out lies
    next to W0 + delta, and where it lies next to W0 their difference is exact), and a block is too
    small for its sums to drift; sums of blocks are taken in float64. Squares that leave float32's
    range are taken again in float64.
    """
    found = _sums(before, wanted, stored.sub_(before))
    if before.dtype == torch.float32 and not (math.isfinite(sum(found)) and found[1]):
        stored.add_(wanted)
        found = _sums(before.double(), wanted.double(), stored.double())
    return Survival(*found, before.numel(), before.numel())


def _sums(
    before: torch.Tensor, wanted: torch.Tensor, change: torch.Tensor
) -> tuple[float, float, float, float]:
    w, d, c = before.view(-1), wanted.view(-1), change.view(-1)
    overlap = torch.dot(c, d).item()
    error = c.sub_(d)
    return (
        torch.dot(w, w).item(),
        torch.dot(d, d).item(),
        overlap,
        torch.dot(error, error).item(),
    )

"""Taking a delta out of a merged weight again, and saying of how many entries that is sure."""

from dataclasses import dataclass

import torch

from lorasb_runtime.merging.delta import Delta
from lorasb_runtime.merging.fold import Put, Rows, adding_dtype, row_blocks, rows_of
from lorasb_runtime.ops.rounding import neighbours, other_neighbour
from lorasb_runtime.types import TargetModule


@dataclass(frozen=True)
class Restoration:
    """Entries of a weight: all, and those of which no other number could have been merged.

    The others lie within one step of the merged weight's dtype of what they were, two where the
    rounding was stochastic.
    """

    entries: int = 0
    certain: int = 0

    def __add__(self, other: "Restoration") -> "Restoration":
        return Restoration(self.entries + other.entries, self.certain + other.certain)

    @property
    def share(self) -> float:
        return self.certain / self.entries if self.entries else 1.0


def restore_target(
    merged: Rows,
    delta: Delta,
    dtype: torch.dtype,
    put: Put,
    target: TargetModule,
    *,
    stochastic: bool,
) -> Restoration:
    """Hand W_merged - delta in the dtype that W0 had to `put`, by rows; see `fold_target`.

    An entry is certain where W0 + delta rounds to W_merged and does so of neither neighbour of W0:
    rounding keeps the order, so that no other number's sum does either. stochastic: the sum may
    have been rounded to either side.
    """
    found = Restoration()
    adding = adding_dtype(merged.dtype, dtype)
    for part in row_blocks(merged.shape):
        rows = merged[part]
        wanted = rows_of(delta, part, target.transposed)
        guess = (rows.to(adding) - wanted).to(dtype)
        above, below = neighbours(guess)
        of_guess, of_above, of_below = (
            _explains(candidate.to(adding) + wanted, rows, stochastic)
            for candidate in (guess, above, below)
        )
        certain = of_guess & ~of_above & ~of_below
        found += Restoration(rows.numel(), int(certain.sum()))
        other = torch.where(of_above, above, torch.where(of_below, below, guess))
        put(part, torch.where(of_guess, guess, other))
    return found


def _explains(total: torch.Tensor, merged: torch.Tensor, stochastic: bool) -> torch.Tensor:
    """Where W0 + delta may have been rounded to the merged weight."""
    near = total.to(merged.dtype)
    same = near == merged
    if not stochastic or merged.element_size() > 2:
        return same
    gap = total - near.to(total.dtype)
    return same | (gap != 0) & (other_neighbour(near, gap) == merged)

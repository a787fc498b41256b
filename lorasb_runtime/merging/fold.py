"""Folding: W0 + delta into one weight, and the measure of what rounding left of the delta."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging.delta import Delta

# A weight is folded by rows, about so many entries at a time: few enough for the processor's cache.
BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Survival:
    """What became of a delta in the stored weights; sums over entries, in float64.

    stored = W_out - W0, the change that really lies in the output.
    """

    weight: float = 0.0  # |W0|^2
    delta: float = 0.0  # |delta|^2
    overlap: float = 0.0  # <stored, delta>
    error: float = 0.0  # |stored - delta|^2

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(
            self.weight + other.weight,
            self.delta + other.delta,
            self.overlap + other.overlap,
            self.error + other.error,
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


def fold_weight(weight: torch.Tensor, delta: Delta, out: torch.Tensor, name: str) -> Survival:
    """Write round(W0 + delta) into `out`: added in `adding_dtype`, rounded once to `out`'s dtype.

    weight, out: [out, in], views allowed, and `out` may be `weight` itself. delta: in the dtype of
    the addition. Raises InputError, which names `name`, when a value leaves the range of `out`'s
    dtype.
    """
    survival = Survival()
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    with _one_thread():
        for start in range(0, weight.shape[0], rows):
            survival += _fold_rows(weight, delta, out, slice(start, start + rows), name)
    return survival


def adding_dtype(weight: torch.dtype) -> torch.dtype:
    """What a delta is added in: float64 for a float64 weight, float32 for any other."""
    return torch.promote_types(weight, torch.float32)


def _fold_rows(
    weight: torch.Tensor, delta: Delta, out: torch.Tensor, part: slice, name: str
) -> Survival:
    before = weight[part].to(adding_dtype(weight.dtype))
    wanted = delta.block(part, slice(None))
    folded = (before + wanted).to(out.dtype)
    survival = _survival(before, wanted, folded)
    if not math.isfinite(survival.error):
        raise InputError(
            f"{name}: found Inf or NaN in the merged weight, expected numbers that fit "
            f"{str(out.dtype).removeprefix('torch.')}"
        )
    out[part] = folded
    return survival


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: blocks are small, and waiting for a busy core costs far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _survival(before: torch.Tensor, wanted: torch.Tensor, folded: torch.Tensor) -> Survival:
    w0, delta = before.double().flatten(), wanted.double().flatten()
    stored = folded.double().flatten() - w0
    overlap = torch.dot(stored, delta).item()
    error = stored.sub_(delta)
    return Survival(
        weight=torch.dot(w0, w0).item(),
        delta=torch.dot(delta, delta).item(),
        overlap=overlap,
        error=torch.dot(error, error).item(),
    )

"""Folding: W0 + delta into one weight, block by block, and the measure of what rounding left."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging.delta import Delta
from lorasb_runtime.merging.survival import Survival, measure
from lorasb_runtime.ops.rounding import round_stochastically
from lorasb_runtime.types import TargetModule

# A weight is folded by rows, about so many entries at a time: few enough for the processor's cache,
# many enough that starting an operation costs little. Stochastic rounding draws by block, too.
BLOCK_ELEMENTS = 1 << 17
# Of a larger weight every fourth block is measured, as measuring costs more than folding.
MEASURED_WHOLE = 1 << 20
MEASURE_EVERY = 4

# Takes some rows of the result and where they belong.
Put = Callable[[slice, torch.Tensor], None]


class Rows(Protocol):
    """A weight as it is stored, of two dimensions; a tensor is one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Rounding:
    """How sums become numbers of a 16-bit dtype: to the nearest, or by chance from a seed.

    A target's draws depend on the seed and the target's name alone.
    """

    stochastic: bool = False
    seed: int = 0

    def round(self, name: str) -> Callable[[torch.Tensor, torch.dtype], torch.Tensor]:
        """What rounds the blocks of the target `name`, in their order."""
        if not self.stochastic:
            return _nearest
        digest = hashlib.sha256(f"{self.seed}|{name}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest)))

        def round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            if dtype.itemsize > 2:
                return x.to(dtype)
            return round_stochastically(x, dtype, generator)

        return round


NEAREST = Rounding()


def _nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype)


def adding_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What a delta is added in: float64 where the weight is, before or after, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def row_blocks(shape: torch.Size) -> Iterator[slice]:
    """The rows of a matrix in parts of about BLOCK_ELEMENTS entries."""
    rows = max(1, BLOCK_ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def fold_target(
    weight: Rows,
    delta: Delta,
    dtype: torch.dtype,
    put: Put,
    target: TargetModule,
    rounding: Rounding = NEAREST,
    measure_all: bool = False,
) -> Survival:
    """Hand W0 + delta, added in `adding_dtype` and rounded once to `dtype`, to `put` by rows.

    weight: [out, in], or [in, out] where the target is transposed, and so is the result; delta: in
    the dtype of the addition. What became of the delta is measured, in blocks spread over the
    weight; in all of it up to MEASURED_WHOLE entries, or on request. Raises InputError, which names
    the target, when a value leaves the range of `dtype`.
    """
    survival = Survival()
    adding = adding_dtype(weight.dtype, dtype)
    round_ = rounding.round(target.module)
    entries = weight.shape[0] * weight.shape[1]
    every = 1 if measure_all or entries <= MEASURED_WHOLE else MEASURE_EVERY
    buffers = torch.empty(3, 0, 0, dtype=adding)
    for number, part in enumerate(row_blocks(weight.shape)):
        rows = weight[part]
        if buffers.shape[1:] != rows.shape:  # the last block has fewer rows
            buffers = torch.empty(3, *rows.shape, dtype=adding, device=rows.device)
        before, total, stored = buffers
        before.copy_(rows)
        wanted = rows_of(delta, part, target.transposed)
        torch.add(before, wanted, out=total)
        _check_range(total, dtype, target)
        folded = round_(total, dtype)
        if number % every == 0:
            survival += measure(before, wanted, stored.copy_(folded))
        put(part, folded)
    return survival.stand_for(entries)


def _check_range(total: torch.Tensor, dtype: torch.dtype, target: TargetModule) -> None:
    low, high = (bound.item() for bound in torch.aminmax(total))
    limit = torch.finfo(dtype).max
    if not (-limit <= low and high <= limit):
        raise InputError(
            f"{target.module}: found Inf or NaN in the merged weight, expected numbers that "
            f"fit {str(dtype).removeprefix('torch.')}"
        )


def rows_of(delta: Delta, part: slice, transposed: bool) -> torch.Tensor:
    """A delta's rows as the weight is stored, contiguous."""
    if transposed:
        return delta.block(slice(None), part).t().contiguous()
    return delta.block(part, slice(None)).contiguous()

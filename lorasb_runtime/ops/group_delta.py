"""y + B (R (A x)) for m target modules that read one x and whose outputs are columns of one y."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorasb_runtime.ops.core_cpu import CoreKernel, kernel_for
from lorasb_runtime.ops.core_matmul import SlotRows, apply_cores, expand_add, shrink

# Up to so many numbers one multiply by B's of all members, zeros between them included, is faster
# than one for each member.
LARGEST_BLOCK_B = 1 << 18


@dataclass(frozen=True)
class Expand:
    """One multiply of the expand step: b [rows, columns] times these numbers of R A x.

    inner: which of the m * r. outer: to which columns of y the result is added.
    """

    b: torch.Tensor
    inner: slice
    outer: slice

    def add(self, y: torch.Tensor, h: torch.Tensor) -> None:
        """y [n, width] += B h, for h [n, m * r]."""
        whole = self.b.shape[0] == y.shape[1]
        expand_add(y if whole else y[:, self.outer], h[:, self.inner], self.b)


class GroupDelta:
    """The group's B, its A where x is not A x already, and where its cores are.

    Decoding rows take one kernel on a CPU, where it can be had; the others, and other devices, a
    multiply for each step of the formula.
    """

    def __init__(
        self,
        parts: Sequence[torch.Tensor],
        begins: Sequence[int],
        cores: torch.Tensor,
        *,
        a: torch.Tensor | None = None,
        decodes: bool = True,
    ) -> None:
        """parts: B [out_i, r] of each member, whose output is y's columns begins[i].. .

        They do not overlap. cores: [slots, m, r, r], a view of the slot table. a: [m * r, in]; None
        where x is A x already. decodes: False where decoding rows are someone else's.
        """
        self.a = a
        self.expands = expands_of(parts, begins)
        self._cores = cores
        self._shape = cores.shape[1:3]
        kernel = kernel_for(parts[0].dtype, cores.dtype, cores.device) if decodes else None
        self._kernel = None if kernel is None else CoreKernel(kernel, parts, begins, cores, a)

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        rows: SlotRows,
        own: Callable[[], torch.Tensor | None],
    ) -> None:
        """Add in place to rows begin..end, each with its own slot's core.

        y: [end - begin, width]. x: [end - begin, in], or [end - begin, m * r] where it is A x.
        own: gives the decoding rows' cores as `apply_cores` takes them.
        """
        if self._kernel is not None and rows.decodes:
            self._kernel.add(y, x, rows.slots)
            if rows.decodes == y.shape[0]:
                return
            y, x = y[rows.decodes :], x[rows.decodes :]
            rows = rows.after_decodes()
        h = (x if self.a is None else shrink(x, self.a)).unflatten(1, self._shape)
        h = apply_cores(h, self._cores, rows, own() if rows.decodes else None).flatten(1)
        for expand in self.expands:
            expand.add(y, h)


def expands_of(parts: Sequence[torch.Tensor], begins: Sequence[int]) -> tuple[Expand, ...]:
    """Few multiplies that expand all members, of parts and begins as of `GroupDelta`."""
    rank = parts[0].shape[1]
    ends = [begin + len(part) for begin, part in zip(begins, parts, strict=True)]
    inner = [slice(i * rank, (i + 1) * rank) for i in range(len(parts))]
    first, last = min(begins), max(ends)
    if len(parts) == 1 or (last - first) * rank * len(parts) > LARGEST_BLOCK_B:
        spans = map(slice, begins, ends)
        return tuple(Expand(*each) for each in zip(parts, inner, spans, strict=True))
    block = parts[0].new_zeros(last - first, rank * len(parts))
    for part, begin, columns in zip(parts, begins, inner, strict=True):
        block[begin - first :, columns][: len(part)] = part
    return (Expand(block, slice(0, block.shape[1]), slice(first, last)),)

"""The delta of rows that each have a core of their own, as one CPU kernel: y + B (R (A x)).

One call instead of one for each multiply, each of which costs more to start than to do. The torch
reference is `core_matmul`'s.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch

from lorasb_runtime.ops.blocks_cpu import pack_blocks
from lorasb_runtime.ops.cpu_library import cpu_function

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = [
    *(_POINTER, _INT, _POINTER, _INT, _INT),  # y, its stride, x, its stride, inputs
    *(_POINTER, _POINTER, _INT, _POINTER, _INT),  # a, cores, their stride, slots, rows
    *(_POINTER, _POINTER, _INT, _INT),  # b, spans, members, r
]


class CoreKernel:
    """The kernel for one group of m target modules that read one input.

    Holds their B, and A where it is given, once more, laid out for it.
    """

    def __init__(
        self,
        kernel: Callable[..., None],
        parts: Sequence[torch.Tensor],
        begins: Sequence[int],
        cores: torch.Tensor,
        a: torch.Tensor | None = None,
    ) -> None:
        """kernel: of `kernel_for`. The rest: as of `GroupDelta`."""
        self._kernel = kernel
        self._dtype = parts[0].dtype
        self._members, self._rank = cores.shape[1:3]
        assert cores.shape[3] == self._rank and cores[0].is_contiguous()
        ends = [begin + len(part) for begin, part in zip(begins, parts, strict=True)]
        spans = [number for span in zip(begins, ends, strict=True) for number in span]
        b = torch.cat([pack_blocks(part) for part in parts])
        shrinks = None if a is None else pack_blocks(a)
        self._held = (b, torch.tensor(spans, dtype=torch.int64), shrinks, cores)
        self._inputs = 0 if a is None else a.shape[1]
        self._a = None if shrinks is None else shrinks.data_ptr()
        self._cores = cores.data_ptr(), cores.stride(0)
        self._b = b.data_ptr(), self._held[1].data_ptr()

    def add(self, y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> None:
        """y[i] += B (R (A x[i])) in place, with R the cores in slots[i], added up in float32.

        slots: int64 [n], for y's and x's first n rows; those of slot 0 are left as they are.
        y: [rows, width]. x: [rows, in], or [rows, m * r] where there is no A. Both with
        neighbouring columns and of B's dtype.
        """
        n, width = slots.shape[0], self._inputs or self._members * self._rank
        assert x.dtype == y.dtype == self._dtype and x.stride(1) == y.stride(1) == 1
        assert n <= min(x.shape[0], y.shape[0]) and x.shape[1] == width
        assert slots.dtype == torch.int64
        self._kernel(
            *(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), self._inputs, self._a),
            *(*self._cores, slots.data_ptr(), n),
            *(*self._b, self._members, self._rank),
        )


@cache
def kernel_for(
    dtype: torch.dtype, stored: torch.dtype, device: torch.device
) -> Callable[..., None] | None:
    """The kernel for activations of `dtype` and cores of `stored`; None where there is none."""
    return cpu_function("add_delta", (dtype, stored), device, _ARGUMENTS)

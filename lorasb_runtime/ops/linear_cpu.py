"""A linear layer on AMX's tiles, for bfloat16.

A decode step reads all weights and does little with each, so that it takes as long as reading does:
the kernel reads up to three times as fast as oneDNN's multiply of few rows (docs/benchmarks.md).
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from lorasb_runtime.ops.blocks_cpu import HELD, pack_blocks, unpack_blocks
from lorasb_runtime.ops.cpu_library import cpu_function

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = [
    *(_POINTER, _INT, _INT, _INT),  # x, its stride, rows, inputs
    *(_POINTER, _INT, _POINTER, _POINTER),  # weight, outputs, bias, y
]


class TileWeight:
    """A weight [out, in] in the kernel's own layout."""

    def __init__(self, kernel: Callable[..., None], weight: torch.Tensor) -> None:
        """kernel: of `linear_kernel`."""
        self._kernel = kernel
        self._outputs, self._inputs = weight.shape
        self._packed = pack_blocks(weight)
        self._place = self._packed.data_ptr()

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x @ weight.T + bias, added up in float32: [..., in] -> [..., out]."""
        dtype = self._packed.dtype
        assert x.dtype == dtype and x.shape[-1] == self._inputs
        rows = x.reshape(-1, self._inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        place = None
        if bias is not None:
            assert bias.dtype == dtype and bias.shape == (self._outputs,) and bias.is_contiguous()
            place = bias.data_ptr()
        y = x.new_empty(*x.shape[:-1], self._outputs)
        self._kernel(
            *(rows.data_ptr(), rows.stride(0), rows.shape[0], self._inputs),
            *(self._place, self._outputs, place, y.data_ptr()),
        )
        return y

    def unpack(self) -> torch.Tensor:
        """The weight [out, in], bit for bit."""
        return unpack_blocks(self._packed, self._outputs, self._inputs)


@cache
def linear_kernel(
    dtype: torch.dtype, inputs: int, device: torch.device
) -> Callable[..., None] | None:
    """The kernel for weights of so many inputs; None where there is none."""
    if dtype != torch.bfloat16 or inputs % HELD:
        return None
    return cpu_function("linear", (dtype,), device, _ARGUMENTS)

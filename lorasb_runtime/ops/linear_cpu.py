"""A linear layer on AMX's tiles, for bfloat16, and the deltas of its rows.

A decode step reads all weights and does little with each, so that it takes as long as reading does:
the kernel reads up to three times as fast as oneDNN's multiply of few rows (docs/benchmarks.md).
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.nn.functional import pad

from lorasb_runtime.ops.blocks_cpu import HELD, block_outputs, pack_blocks, unpack_blocks
from lorasb_runtime.ops.cpu_library import cpu_function

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = [
    *(_POINTER, _INT, _INT, _POINTER),  # x, rows, inputs, weight
    *(_INT, _POINTER, _POINTER),  # outputs, bias, y
]
_ADAPTED_ARGUMENTS = [
    *_ARGUMENTS,
    *(_POINTER, _POINTER, _INT, _POINTER, _INT),  # h, cores, their stride, slots, adapted rows
    *(_POINTER, _POINTER, _INT, _INT),  # b, spans, members, r
]


class TileWeight:
    """A weight [out, in] in the kernel's own layout."""

    def __init__(self, kernel: Callable[..., None], weight: torch.Tensor) -> None:
        """kernel: of `linear_kernel`."""
        self._kernel = kernel
        self._outputs, self._inputs = weight.shape
        self._packed = pack_blocks(weight)
        self._place = self._packed.data_ptr()

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, outputs: int | None = None
    ) -> torch.Tensor:
        """x @ weight.T + bias, added up in float32: [..., in] -> [..., out], or the first of it."""
        return self.run(self._kernel, x, bias, outputs or self._outputs)

    def unpack(self) -> torch.Tensor:
        """The weight [out, in], bit for bit."""
        return unpack_blocks(self._packed, self._outputs, self._inputs)

    def adapted(
        self, parts: Sequence[torch.Tensor], begins: Sequence[int], cores: torch.Tensor
    ) -> "AdaptedTiles | None":
        """With the deltas of a group, whose A's are the last outputs; None where members share a
        block. Arguments as of `GroupDelta`.
        """
        kernel = cpu_function(
            "adapted_linear",
            (self._packed.dtype, cores.dtype),
            cores.device,
            _ADAPTED_ARGUMENTS,
        )
        outputs = self._outputs - cores.shape[1:3].numel()
        if kernel is None or any(column % block_outputs() for column in (*begins, outputs)):
            return None
        return AdaptedTiles(kernel, self, outputs, parts, begins, cores)

    def run(
        self,
        kernel: Callable[..., None],
        x: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: int,
        *more: int,
    ) -> torch.Tensor:
        """The first outputs that the kernel computes of x. more: arguments after _ARGUMENTS."""
        dtype = self._packed.dtype
        assert x.dtype == dtype and x.shape[-1] == self._inputs
        if not x.is_contiguous():
            x = x.contiguous()
        place = None
        if bias is not None:
            assert bias.dtype == dtype and len(bias) >= outputs and bias.is_contiguous()
            place = bias.data_ptr()
        y = torch.empty((*x.shape[:-1], outputs), dtype=dtype)
        kernel(
            *(x.data_ptr(), x.numel() // self._inputs, self._inputs, self._place),
            *(outputs, place, y.data_ptr(), *more),
        )
        return y


class AdaptedTiles:
    """A weight and the deltas of a group, which decoding rows get in one call."""

    def __init__(
        self,
        kernel: Callable[..., None],
        weight: TileWeight,
        outputs: int,
        parts: Sequence[torch.Tensor],
        begins: Sequence[int],
        cores: torch.Tensor,
    ) -> None:
        """outputs: of the weight, the A's behind them left out."""
        self._kernel = kernel
        self._weight = weight
        self._outputs = outputs
        members, rank = cores.shape[1:3]
        assert cores.shape[3] == rank and cores[0].is_contiguous()
        assert all(part.dtype == torch.bfloat16 for part in parts)
        # A tile takes HELD inputs of the weight, and so it does of B.
        b = torch.cat([pack_blocks(pad(part, (0, -rank % HELD))) for part in parts])
        ends = [begin + len(part) for begin, part in zip(begins, parts, strict=True)]
        spans = torch.tensor([*zip(begins, ends, strict=True)], dtype=torch.int64)
        self._held = b, spans, cores
        self._width = members * rank
        self._cores = cores.data_ptr(), cores.stride(0)
        self._b = b.data_ptr(), spans.data_ptr(), members, rank

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """W x + bias + B (R (A x)), rounded once, with R the cores in slots[i] for row i; and A x.

        slots: int64 [n], for x's first n rows; those of slot 0 and all others get W x + bias.
        [..., in] -> [..., out], [..., m * r].
        """
        count = slots.shape[0]
        assert slots.dtype == torch.int64 and count * x.shape[-1] <= x.numel()
        h = torch.empty((*x.shape[:-1], self._width), dtype=x.dtype)
        y = self._weight.run(
            *(self._kernel, x, bias, self._outputs, h.data_ptr()),
            *(*self._cores, slots.data_ptr(), count, *self._b),
        )
        return y, h


@cache
def linear_kernel(
    dtype: torch.dtype, inputs: int, device: torch.device
) -> Callable[..., None] | None:
    """The kernel for weights of so many inputs; None where there is none."""
    if dtype != torch.bfloat16 or inputs % HELD:
        return None
    return cpu_function("linear", (dtype,), device, _ARGUMENTS)

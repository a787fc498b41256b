"""Dense multiplies in the form that is fastest on this device: prepacked weights, batched rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from lorasb_runtime.ops.linear_cpu import TileWeight, linear_kernel

# Weights with fewer elements multiply faster as they are.
SMALLEST_PACKED = 1 << 16
# Matrices with fewer rows are multiplied by vectors faster in float32 than in 16 bits.
SMALLEST_NARROW = 64
# oneDNN lays a weight out for a number of rows; this layout is near the best from 1 to 512.
PACKED_FOR_ROWS = 64


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which weights of `dtype` are best held and multiplied on this device.

    float32 for 16-bit floats on a CPU without instructions for them, where torch falls back to
    kernels that are several times slower than its float32 ones; otherwise `dtype` itself.
    """
    slow = device.type == "cpu" and dtype.itemsize == 2 and not _native(dtype)
    return torch.float32 if slow else dtype


class AdaptedWeight(Protocol):
    """A packed weight with the deltas of a group, as of `GroupDelta`, for decoding rows."""

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x @ weight.T + bias + the delta of slots[i] for row i, and A x.

        [..., in] -> [..., out], [..., m * r]; slots: int64 [n], for the first n rows.
        """


class PackedWeight(Protocol):
    """A weight [out, in] in a layout of its own."""

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, outputs: int | None = None
    ) -> torch.Tensor:
        """x @ weight.T + bias: [..., in] -> [..., out], or the first `outputs` of it."""

    def unpack(self) -> torch.Tensor:
        """The weight, bit for bit."""

    def adapted(
        self, parts: Sequence[torch.Tensor], begins: Sequence[int], cores: torch.Tensor
    ) -> AdaptedWeight | None:
        """With these deltas, where one kernel computes both; A's are the last outputs.

        Arguments as of `GroupDelta`.
        """


@dataclass(frozen=True)
class DnnWeight:
    """In oneDNN's layout."""

    packed: torch.Tensor

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, outputs: int | None = None
    ) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return y if outputs in (None, y.shape[-1]) else y[..., :outputs]

    def unpack(self) -> torch.Tensor:
        return self.packed.to_dense()

    def adapted(self, *group: object) -> None:
        return None


def pack_weight(weight: torch.Tensor) -> PackedWeight | None:
    """The weight [out, in] as it multiplies fastest; None where that is as it is."""
    if weight.device.type != "cpu" or weight.numel() < SMALLEST_PACKED:
        return None
    if not torch.backends.mkldnn.is_available() or not _native(weight.dtype):
        return None
    kernel = linear_kernel(weight.dtype, weight.shape[1], weight.device)
    if kernel is not None:
        return TileWeight(kernel, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
    return DnnWeight(packed)


def batched_matvec(matrices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """matrices[i] @ rows[i] for every row: [n, r, r], [..., r] of n in all -> same shape and dtype.

    As a row times a transposed matrix, which torch's CPU kernel does several times faster than a
    matrix times a column from r = 32 on, and no slower below.
    """
    wide = rows.to(matrices.dtype).reshape(-1, 1, rows.shape[-1])
    return torch.bmm(wide, matrices.transpose(1, 2)).to(rows.dtype).view(rows.shape)


def matvec_dtype(size: int, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to hold matrices [n, size, size] for `batched_matvec` with such rows.

    float32 for small ones on a CPU, which multiplies many small 16-bit matrices at half its
    float32 speed; larger ones cost their memory traffic, of which float32 has twice as much.
    """
    narrow = device.type == "cpu" and size < SMALLEST_NARROW
    return torch.float32 if narrow and dtype.itemsize < 4 else dtype


@cache
def _native(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for the dtype."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32

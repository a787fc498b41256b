"""Dense multiplies, with a way round CPUs that have no instructions for 16-bit floats."""

from functools import cache

import torch
from torch.nn.functional import linear

# Below this many rows the multiply reads the weight once either way, and converting it costs more.
FEWEST_ROWS = 4


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias: [..., in], [out, in] -> [..., out], in x's dtype.

    Where the CPU cannot multiply 16-bit floats itself, torch falls back to a slow kernel; then
    weight and rows are widened to float32 for the call and the result is rounded once.
    """
    if _slow(x) and x.numel() >= FEWEST_ROWS * x.shape[-1]:
        wide = linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)
    return linear(x, weight, bias)


def dense_add(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y + x @ weight.T, written into y: [..., out], [..., in], [out, in] -> [..., out]."""
    if _slow(x):
        return y.add_(dense(x, weight))
    flat = y.view(-1, y.shape[-1])
    flat.addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return y


def batched_matvec(matrices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """matrices[i] @ rows[i] for every row: [n, r, r], [n, r] -> [n, r].

    As a row times a transposed matrix, which torch's CPU kernel does several times faster than a
    matrix times a column from r = 32 on, and no slower below.
    """
    if _slow(rows):
        return batched_matvec(matrices.float(), rows.float()).to(rows.dtype)
    return torch.bmm(rows.unsqueeze(1), matrices.transpose(1, 2)).squeeze(1)


def _slow(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _slow_dtypes()


@cache
def _slow_dtypes() -> frozenset[torch.dtype]:
    """16-bit float dtypes that this CPU has no instructions for."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, check in supported.items() if not check())

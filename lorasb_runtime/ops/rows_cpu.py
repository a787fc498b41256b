"""What a decoder layer does to each row between its matrix multiplies, one CPU kernel for each.

torch takes several operations for each of them, which cost more to start than to do. Sums and
functions are in float32, and results are rounded once.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from lorasb_runtime.ops.cpu_library import cpu_function

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True)
class RowKernels:
    """The kernels for rows of one dtype."""

    dtype: torch.dtype
    _norm: Callable[..., None]
    _gate: Callable[..., None]
    _rotate: Callable[..., None]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension; weight: float32 [n]."""
        rows = self._rows(x)
        assert weight.shape == rows.shape[1:] and weight.dtype == torch.float32
        out = torch.empty(x.shape, dtype=x.dtype)
        self._norm(
            *(rows.data_ptr(), rows.stride(0), weight.data_ptr(), out.data_ptr(), *rows.shape, eps)
        )
        return out

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, for two tensors of one shape."""
        assert gate.shape == up.shape
        gates, ups = self._rows(gate), self._rows(up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        self._gate(
            *(gates.data_ptr(), gates.stride(0), ups.data_ptr(), ups.stride(0)),
            *(out.data_ptr(), *gates.shape),
        )
        return out

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Turn q [n, heads, d] and k [n, kv_heads, d] in place, by rotary embeddings [n, d].

        Number j of a head turns with number j + d / 2, as in Llama.
        """
        (n, heads, d), kv_heads = q.shape, k.shape[1]
        assert k.shape == (n, kv_heads, d) and cos.shape == sin.shape == (n, d) and d % 2 == 0
        assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == sin.dtype == self.dtype
        assert q.dtype == k.dtype == self.dtype and q.stride()[1:] == k.stride()[1:] == (d, 1)
        self._rotate(
            *(q.data_ptr(), q.stride(0), heads, k.data_ptr(), k.stride(0), kv_heads),
            *(cos.data_ptr(), sin.data_ptr(), n, d),
        )

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> [rows, n] with neighbouring columns, a view where that is possible."""
        assert x.dtype == self.dtype
        flat = x.reshape(-1, x.shape[-1])
        return flat if flat.stride(1) == 1 else flat.contiguous()


@cache
def row_kernels(dtype: torch.dtype, device: torch.device) -> RowKernels | None:
    """The kernels for this dtype; None where there are none."""
    norm = [_POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _FLOAT]
    gate = [_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT]
    rotate = [*(_POINTER, _INT, _INT) * 2, _POINTER, _POINTER, _INT, _INT]
    functions = [
        cpu_function(name, (dtype,), device, arguments)
        for name, arguments in (("rms_norm", norm), ("silu_mul", gate), ("rotate", rotate))
    ]
    found = [function for function in functions if function is not None]
    return RowKernels(dtype, *found) if len(found) == len(functions) else None

"""Decode attention over the KV cache as one CPU kernel, which reads keys and values in place.

The torch reference is `attention.attend_decode`, after the new keys and values are stored.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from lorasb_runtime.ops.cpu_library import cpu_function

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = [
    *(_POINTER, _INT, _INT) * 4,  # q, k, v, out, each with the strides of rows and heads
    *(_POINTER, _POINTER, _INT, _INT),  # keys, values, their strides of rows and heads
    *(_POINTER, _POINTER, _INT),  # rows, positions, how many
    *(_INT, _INT, _INT, _INT, _FLOAT, _FLOAT),  # heads, kv_heads, d, window, scaling, softcap
]


@cache
def attention_kernel(dtype: torch.dtype, device: torch.device) -> Callable[..., None] | None:
    """The kernel for queries, keys and values of this dtype; None where there is none."""
    return cpu_function("attend_cached", (dtype,), device, _ARGUMENTS)


def attend_cached(
    kernel: Callable[..., None],
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """One token of each of n sequences: stores its key and value, then writes `out` [n, heads, d].

    qkv: [n, heads, d] and twice [n, kv_heads, d], each with neighbouring numbers of a head. cached:
    keys and values, both [rows, kv_heads, capacity, d] and contiguous. rows, positions: int64 [n],
    sequence i's row there and its token's place, of which it sees 0..positions[i], the last
    `window` of them. All of the dtype that `kernel` is for; sums and softmax are float32.
    """
    q, k, v = qkv
    keys, values = cached
    n, heads, d = q.shape
    kv_heads = keys.shape[1]
    assert k.shape == v.shape == (n, kv_heads, d) and out.shape == q.shape
    assert keys.shape == values.shape and keys.is_contiguous() and values.is_contiguous()
    assert keys.shape[3] == d and rows.shape == positions.shape == (n,)
    assert rows.dtype == positions.dtype == torch.int64 and keys.dtype == q.dtype == out.dtype
    places: list[int] = []
    for tensor in (q, k, v, out):
        assert tensor.stride(2) == 1
        places += (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
    kernel(
        *places,
        *(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1)),
        *(rows.data_ptr(), positions.data_ptr(), n, heads, kv_heads, d),
        *(window or 0, scaling, softcap or 0.0),
    )

"""Attention over the KV cache as one CPU kernel, which reads keys and values in place.

For sequences with one or few new tokens each. The torch reference is `attention.attend_decode`, or
`attend_prefill`, after the new keys and values are stored.
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
    *(_POINTER, _INT),  # spans, how many
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
    spans: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """The new tokens of n sequences: stores their keys and values, then writes their rows of `out`.

    qkv: [tokens, heads, d] and twice [tokens, kv_heads, d], each with neighbouring numbers of a
    head. out: [tokens, heads, d]. cached: keys and values, both [rows, kv_heads, capacity, d] and
    contiguous. spans: int64 [4, n] and contiguous: each sequence's first row of the batch, how many
    it has there, its row of the cache, and the first one's position. A token at position p sees
    0..p, the last `window` of them. All of the dtype that `kernel` is for; sums and softmax are
    float32.
    """
    q, k, v = qkv
    keys, values = cached
    tokens, heads, d = q.shape
    kv_heads = keys.shape[1]
    assert k.shape == v.shape == (tokens, kv_heads, d) and out.shape == q.shape
    assert keys.shape == values.shape and keys.is_contiguous() and values.is_contiguous()
    assert keys.shape[3] == d and keys.dtype == q.dtype == out.dtype
    assert spans.dtype == torch.int64 and spans.shape[0] == 4 and spans.is_contiguous()
    places: list[int] = []
    for tensor in (q, k, v, out):
        assert tensor.stride(2) == 1
        places += (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
    kernel(
        *places,
        *(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1)),
        *(spans.data_ptr(), spans.shape[1], heads, kv_heads, d),
        *(window or 0, scaling, softcap or 0.0),
    )

"""Attention of new queries over cached keys and values, with grouped KV heads."""

import torch
from torch.nn.functional import scaled_dot_product_attention

# From this many rows on, a CPU is faster by batched multiplies than by torch's fused attention,
# which handles each head's few queries on their own; 16-bit keys are widened for it, so many.
FEWEST_BATCHED_ROWS = 4
MOST_WIDENED_KEYS = 1 << 22


def attend_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """One query [heads, d] for each of `rows` sequences: [rows, heads, d] -> [rows, heads, d].

    k, v: [rows, kv_heads, length, d]. bias: [rows, heads, length] from `decode_bias`. The query
    heads of one KV head are handled as rows of one product, which spares repeating K and V.
    """
    rows, heads, d = q.shape
    kv_heads, length = k.shape[1:3]
    group = heads // kv_heads
    if softcap is None and not _batched(k):
        grouped = q.reshape(rows, kv_heads, group, d)
        mask = bias.view(rows, kv_heads, group, length)
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling)
        return out.reshape(rows, heads, d)
    return _attend(
        q.reshape(rows * kv_heads, group, d),
        k.flatten(0, 1),
        v.flatten(0, 1),
        bias.view(rows * kv_heads, group, length),
        scaling,
        softcap,
    ).reshape(rows, heads, d)


def _batched(k: torch.Tensor) -> bool:
    """Whether queries over keys [rows, kv_heads, length, d] are handled by batched multiplies."""
    if k.device.type != "cpu" or k.shape[0] < FEWEST_BATCHED_ROWS:
        return False
    return k.dtype == torch.float32 or k.numel() <= MOST_WIDENED_KEYS


def attend_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """A chunk of one sequence: [heads, chunk, d] over [kv_heads, length, d] -> [heads, chunk, d].

    bias: [chunk, length] from `causal_bias`, or None for a chunk that starts its sequence (plain
    causal).
    """
    heads, chunk, d = q.shape
    kv_heads = k.shape[0]
    if bias is None and softcap is None:
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scaling, enable_gqa=heads != kv_heads
        )
        return out[0]
    if bias is None:
        bias = causal_bias(0, chunk, None, q)
    group = heads // kv_heads
    grouped = q.reshape(kv_heads, group * chunk, d)
    bias = bias.repeat(group, 1)
    if softcap is None:
        out = scaled_dot_product_attention(grouped[None], k[None], v[None], bias, scale=scaling)
    else:
        out = _attend(grouped, k, v, bias.expand(kv_heads, -1, -1), scaling, softcap)
    return out.reshape(heads, chunk, d)


def causal_bias(start: int, end: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[end - start, end] in the dtype of `like`: 0 where positions start..end-1 see, else -inf.

    `window` counts the positions that each one sees, its own included.
    """
    queries = torch.arange(start, end, device=like.device)[:, None]
    keys = torch.arange(end, device=like.device)[None, :]
    visible = keys <= queries
    return _bias(visible if window is None else visible & (keys > queries - window), like)


def decode_bias(
    lengths: torch.Tensor, length: int, window: int | None, q: torch.Tensor
) -> torch.Tensor:
    """[rows, heads, length] for queries q [rows, heads, d]: 0 where a row sees, else -inf.

    Row i sees its first lengths[i] positions (at least one), the last `window` of them.
    """
    keys = torch.arange(length, device=q.device)[None, :]
    visible = keys < lengths[:, None]
    if window is not None:
        visible &= keys >= lengths[:, None] - window
    return _bias(visible, q)[:, None, :].repeat(1, q.shape[1], 1)


def _bias(visible: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~visible, float("-inf"))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """[n, queries, d] over [n, length, d], as batched multiplies; bias: [n, queries, length]."""
    q, k, bias = q.float(), k.float(), bias.float()  # scores of 16 bits would be too coarse
    if softcap is None:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scaling)
    else:
        scores = torch.bmm(q, k.transpose(1, 2)) * (scaling / softcap)
        scores = torch.tanh(scores) * softcap + bias
    return torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v)

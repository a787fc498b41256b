"""Attention of new queries over cached keys and values, with grouped KV heads."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """One query [heads, d] for each of `rows` sequences: [rows, heads, d] -> [rows, heads, d].

    k, v: [rows, kv_heads, length, d]. visible: bool [rows, length], which cached positions each
    row may see (at least one). The query heads of one KV head are handled as rows of one product,
    which spares repeating K and V.
    """
    rows, heads, d = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, d)
    out = _attend(grouped, k, v, visible[:, None, None, :], scaling, softcap)
    return out.reshape(rows, heads, d)


def attend_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """A chunk of one sequence: [heads, chunk, d] over [kv_heads, length, d] -> [heads, chunk, d].

    visible: bool [chunk, length], or None for a chunk that starts its sequence (plain causal).
    """
    heads, chunk, d = q.shape
    kv_heads = k.shape[0]
    if visible is None and softcap is None:
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scaling, enable_gqa=heads != kv_heads
        )
        return out[0]
    if visible is None:
        visible = causal_mask(0, chunk, None, q.device)
    group = heads // kv_heads
    grouped = q.reshape(1, kv_heads, group * chunk, d)
    mask = visible.repeat(group, 1)[None, None]
    out = _attend(grouped, k[None], v[None], mask, scaling, softcap)
    return out.reshape(heads, chunk, d)


def causal_mask(start: int, end: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool [end - start, end]: what positions start..end-1 see; `window` counts positions seen."""
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(end, device=device)[None, :]
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def decode_mask(lengths: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """Bool [rows, length]: row i sees its first lengths[i] positions, the last `window` of them."""
    keys = torch.arange(length, device=lengths.device)[None, :]
    visible = keys < lengths[:, None]
    return visible if window is None else visible & (keys >= lengths[:, None] - window)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scaling / softcap)) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v

"""Decode attention in each of its forms, against float64."""

import pytest
import torch

from lorasb_runtime.ops import attention
from lorasb_runtime.ops.attention import attend_decode, decode_bias
from lorasb_runtime.ops.attention_cpu import attend_cached, attention_kernel

HEADS, KV_HEADS, SIZE, LENGTH = 6, 2, 16, 40
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", list(ERRORS))
def test_decode_attention_sees_what_it_should(
    dtype: torch.dtype,
    rows: int,
    window: int | None,
    batched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_batched", lambda _: batched)
    generator = torch.Generator().manual_seed(rows)
    q = torch.randn(rows, HEADS, SIZE, generator=generator).to(dtype)
    k, v = torch.randn(2, rows, KV_HEADS, 64, SIZE, generator=generator).to(dtype)[..., :LENGTH, :]
    lengths = torch.randint(1, LENGTH + 1, (rows,), generator=generator)
    out = attend_decode(q, k, v, decode_bias(lengths, LENGTH, window, q), SIZE**-0.5)
    assert out.dtype == dtype
    assert out.shape == q.shape
    for row, seen in enumerate(lengths.tolist()):
        part = slice(max(0, seen - (window or seen)), seen)
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            keys, values = (t[row, shared, part].double() for t in (k, v))
            weights = torch.softmax(keys @ q[row, head].double() / SIZE**0.5, dim=0)
            assert (out[row, head].double() - weights @ values).abs().max() < ERRORS[dtype]


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "window", "softcap"),
    [
        (6, 2, 16, None, None),
        (9, 3, 64, 20, None),
        (5, 1, 24, None, 3.0),  # five heads share a key: four and one
        (2, 2, 8, 7, None),
        (4, 1, 80, 1, None),
        (8, 2, 128, None, 5.0),
        (3, 3, 7, 18, 2.0),
    ],
)
def test_the_kernel_stores_and_attends_in_place(
    heads: int,
    kv_heads: int,
    d: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    """Sequences of many lengths, one new token each or some; what is no one's stays as it is."""
    kernel = attention_kernel(dtype, torch.device("cpu"))
    assert kernel is not None
    torch.manual_seed(d)
    capacity, tokens = 70, 19
    # Row of the batch, how many tokens, row of the cache, position; one row of the batch unused.
    spans = [
        (0, 1, 4, 0),
        (1, 1, 0, 15),
        (10, 6, 7, 12),
        (2, 7, 2, 0),
        (16, 1, 3, 38),
        (17, 2, 5, 68),
    ]
    keys, values = torch.full((2, 9, kv_heads, capacity, d), torch.nan, dtype=dtype)
    for _, _, row, at in spans:
        keys[row, :, :at], values[row, :, :at] = torch.randn(2, kv_heads, at, d).to(dtype)
    expected_cache = keys.clone(), values.clone()
    packed = torch.randn(tokens, (heads + 2 * kv_heads) * d + 3).to(dtype)[:, :-3]
    q, k, v = (
        part.unflatten(1, (-1, d))
        for part in packed.split([heads * d, kv_heads * d, kv_heads * d], dim=1)
    )
    out = torch.zeros(tokens, heads, d, dtype=dtype)
    attend_cached(
        kernel,
        (q, k, v),
        out,
        (keys, values),
        torch.tensor(spans).t().contiguous(),
        scaling=d**-0.5,
        window=window,
        softcap=softcap,
    )
    assert not out[9].any()
    for first, count, row, at in spans:
        for old, new in zip(expected_cache, (k, v), strict=True):
            old[row, :, at : at + count] = new[first : first + count].transpose(0, 1)
        for i, end in zip(range(first, first + count), range(at + 1, at + count + 1), strict=True):
            seen = slice(max(0, end - (window or end)), end)
            for head in range(heads):
                shared = head * kv_heads // heads
                own, theirs = (t[row, shared, seen].double() for t in expected_cache)
                scores = own @ q[i, head].double() / d**0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                expected = torch.softmax(scores, dim=0) @ theirs
                assert (out[i, head].double() - expected).abs().max() < ERRORS[dtype]
    for found, expected in zip((keys, values), expected_cache, strict=True):
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def test_the_kernel_keeps_a_nan_in_its_sequence() -> None:
    kernel = attention_kernel(torch.float32, torch.device("cpu"))
    assert kernel is not None
    keys, values = torch.randn(2, 2, 1, 40, 16)
    keys[1, 0, 20] = torch.nan
    q, k, v, out = torch.randn(4, 2, 1, 16)
    spans = torch.tensor([[0, 1], [1, 1], [0, 1], [39, 39]])
    attend_cached(kernel, (q, k, v), out, (keys, values), spans, scaling=0.25)
    assert out[0].isfinite().all() and out[1].isnan().all()

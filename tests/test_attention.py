"""Decode attention in each of its forms, against float64."""

import pytest
import torch

from lorasb_runtime.ops import attention
from lorasb_runtime.ops.attention import attend_decode, decode_bias

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


def test_tiles_choose_the_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    many, wide = torch.zeros(8, 2, 4, 4), torch.zeros(8, 2, 4, 4, dtype=torch.bfloat16)
    for tiles in (True, False):
        monkeypatch.setattr(attention, "has_tiles", lambda _, tiles=tiles: tiles)
        assert attention._batched(many)
        assert attention._batched(wide) != tiles
        assert not attention._batched(many[:2])

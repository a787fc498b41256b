"""A linear layer on AMX's tiles, alone and with its rows' deltas, against float64."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from closeness import close
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_runtime.ops.linear_cpu import TileWeight, linear_kernel

BF16, CPU = torch.bfloat16, torch.device("cpu")
SLOTS = 4


@pytest.fixture(scope="module")
def kernel() -> Callable[..., None]:
    found = linear_kernel(BF16, 32, CPU)
    if found is None:  # the kernel is these instructions: elsewhere oneDNN's multiply is tested
        info = Path("/proc/cpuinfo")
        assert not info.exists() or "amx_bf16" not in info.read_text().split()
        pytest.skip("this CPU has no tiles")
    return found


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 150),
    inputs=st.sampled_from([32, 64, 160, 2080]),
    rows=st.one_of(st.integers(0, 70), st.just(300)),
    bias=st.booleans(),
)
def test_it_is_the_multiply(
    kernel: Callable[..., None], outputs: int, inputs: int, rows: int, bias: bool
) -> None:
    weight = torch.randn(outputs, inputs).to(BF16)
    packed = TileWeight(kernel, weight)
    assert torch.equal(packed.unpack(), weight)
    x = torch.randn(1, rows, 2 * inputs).to(BF16)[..., ::2]  # not contiguous
    added = torch.randn(outputs).to(BF16) if bias else None
    expected = x.double() @ weight.double().t() + (0 if added is None else added.double())
    found = packed.multiply(x, added)
    assert found.shape == (1, rows, outputs)
    first = packed.multiply(x, added, -(-outputs // 2))
    assert torch.equal(first, found[..., : first.shape[-1]])
    assert not rows or close(found, expected, BF16, 2)


def adapted(
    kernel: Callable[..., None],
    outs: Sequence[int],
    members: Sequence[int],
    rank: int,
    cores: torch.Tensor,
    slots: Sequence[int],
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W x + bias + B R A x found and expected, for deltas of some of the parts; and W x + bias."""
    inputs, width = 64, sum(outs)
    m = len(members)
    weight = torch.randn(width + m * rank, inputs).to(BF16) / inputs**0.5
    bias = torch.cat([torch.randn(width), torch.zeros(m * rank)]).to(BF16)
    x = torch.randn(1, rows, inputs).to(BF16)
    begins = [sum(outs[:i]) for i in members]
    parts = [torch.randn(outs[i], rank).to(BF16) / rank**0.5 for i in members]
    whole = TileWeight(kernel, weight).adapted(parts, begins, cores)
    assert whole is not None
    found, shrunk = whole.multiply(x, bias, torch.tensor(slots, dtype=torch.int64))
    h = x.double() @ weight[width:].double().t()
    assert close(shrunk, h, BF16, 2)
    plain = x.double() @ weight[:width].double().t() + bias[:width].double()
    expected = plain.clone()
    for row, slot in enumerate(slots):
        for i, (begin, b) in enumerate(zip(begins, parts, strict=True)):
            v = cores[slot, i].double() @ h[0, row, i * rank : (i + 1) * rank]
            expected[0, row, begin : begin + len(b)] += b.double() @ v
    return found, expected, plain


def table(members: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Cores in the middle of wider rows, slot 0 zero."""
    wide = torch.randn(SLOTS, members * rank * rank + 5) / rank**0.5
    wide[0] = 0
    return wide.to(dtype)[:, 5:].view(SLOTS, members, rank, rank)


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    blocks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rank=st.one_of(st.sampled_from([16, 32, 64]), st.integers(1, 70)),
    rows=st.integers(1, 70),
    stored=st.sampled_from([BF16, torch.float32]),
)
def test_every_row_gets_its_own_delta(
    kernel: Callable[..., None],
    data: st.DataObject,
    blocks: list[int],
    rank: int,
    rows: int,
    stored: torch.dtype,
) -> None:
    """Parts are whole blocks, as where A begins behind them must be one."""
    outs = [16 * n for n in blocks]
    members = data.draw(st.lists(st.sampled_from(range(len(outs))), min_size=1, unique=True))
    slots = data.draw(st.lists(st.integers(0, SLOTS - 1), max_size=rows))
    cores = table(len(members), rank, stored)
    found, expected, _ = adapted(kernel, outs, sorted(members), rank, cores, slots, rows)
    assert close(found, expected, BF16, 8)


def test_cores_that_overflow_spoil_their_own_rows_alone(kernel: Callable[..., None]) -> None:
    cores = table(2, 24, BF16)
    cores[2], cores[3] = torch.inf, torch.nan
    found, expected, plain = adapted(kernel, [64, 32], [0, 1], 24, cores, [1, 2, 3, 0], 6)
    assert not found[0, 1].isfinite().all() and found[0, 2].isnan().any()
    for rows, wanted in ((slice(0, 1), expected), (slice(3, 6), plain)):
        assert close(found[:, rows], wanted[:, rows], BF16, 8)


def test_members_that_share_a_block_have_no_kernel(kernel: Callable[..., None]) -> None:
    weight = TileWeight(kernel, torch.randn(24 + 8, 32).to(BF16))
    parts = [torch.randn(8, 4).to(BF16), torch.randn(16, 4).to(BF16)]
    assert weight.adapted(parts, [0, 8], table(2, 4, BF16)) is None

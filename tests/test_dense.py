"""Dense multiplies and cores per row, in every form, against float64."""

import pytest
import torch

from lorasb_runtime.ops import dense as dense_module
from lorasb_runtime.ops.core_matmul import SlotRows, apply_cores, expand_add, shrink
from lorasb_runtime.ops.dense import batched_matvec, dense, dense_add

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["widened", "as it is"])
def widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways on any machine: as if it had instructions for 16-bit floats, and as if not."""
    slow = frozenset(DTYPES[1:]) if request.param else frozenset()
    monkeypatch.setattr(dense_module, "_slow_dtypes", lambda: slow)
    return bool(request.param)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    assert found.dtype == dtype
    allowed = 4 * torch.finfo(dtype).eps * expected.abs().max()
    return bool((found.double() - expected).abs().max() <= allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 33])
def test_dense(rows: int, dtype: torch.dtype, widened: bool) -> None:
    torch.manual_seed(rows)
    x, w = torch.randn(1, rows, 24).to(dtype), torch.randn(40, 24).to(dtype)
    bias, y = torch.randn(40).to(dtype), torch.randn(1, rows, 40).to(dtype)
    exact = x.double() @ w.double().t()
    assert close(dense(x, w), exact, dtype)
    assert close(dense(x, w, bias), exact + bias.double(), dtype)
    expected = exact + y.double()
    assert close(dense_add(y, x, w), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4, 32, 64])
def test_each_row_gets_its_own_core(rank: int, dtype: torch.dtype, widened: bool) -> None:
    torch.manual_seed(rank)
    table = torch.randn(6, 3 * rank * rank)
    table[0] = 0
    cores = table.to(dtype)[:, rank * rank : 2 * rank * rank].view(6, rank, rank)
    slots = [3, 0, 5, 1, 3] + [0] * 4 + [2] * 7
    h = torch.randn(len(slots), rank).to(dtype)
    expected = torch.einsum("tij,tj->ti", cores[slots].double(), h.double())
    rows = SlotRows(torch.tensor(slots[:5]), ((0, 5, 9), (2, 9, 16)), True)
    assert close(apply_cores(h, cores, rows), expected, dtype)
    every = SlotRows(torch.tensor(slots), (), True)
    assert close(apply_cores(h, cores, every), expected, dtype)
    assert close(batched_matvec(cores[slots], h), expected, dtype)
    alone = SlotRows(torch.tensor([], dtype=torch.int64), ((2, 0, 16),), True)
    same = h.double() @ cores[2].double().t()
    assert close(apply_cores(h, cores, alone), same, dtype)


def test_the_whole_formula(widened: bool) -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(5, 12), torch.randn(3, 12), torch.randn(7, 3)
    w, core = torch.randn(7, 12), torch.randn(2, 3, 3)
    rows = SlotRows(torch.tensor([1, 1, 1, 1, 1]), (), True)
    found = expand_add(dense(x, w), apply_cores(shrink(x, a), core, rows), b)
    expected = x.double() @ (w.double() + b.double() @ core[1].double() @ a.double()).t()
    assert close(found, expected, torch.float32)

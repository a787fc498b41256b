"""B (R (A x)) of a group, by the CPU kernel and by torch's multiplies, against float64."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from closeness import close
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_runtime.ops import cpu_library, group_delta
from lorasb_runtime.ops.core_cpu import kernel_for
from lorasb_runtime.ops.core_matmul import SlotRows
from lorasb_runtime.ops.cpu_library import WITHOUT_TILES, build_library
from lorasb_runtime.ops.group_delta import GroupDelta, expands_of

CPU = torch.device("cpu")
SLOTS = 5
# Flags that make the kernels those of other machines.
OTHER_MACHINES = {
    "kernel without tiles": WITHOUT_TILES,
    "kernel for AVX2": ("-march=x86-64-v3",),
    "kernel for any x86": ("-march=x86-64",),
}
if platform.machine() != "x86_64":
    OTHER_MACHINES = {}
GAP = 3  # columns of y between the members' outputs, which nobody may touch


@dataclass
class Group:
    """A group of random modules; cores lie inside a wider table, slot 0 zero."""

    a: torch.Tensor
    parts: list[torch.Tensor]
    begins: list[int]
    cores: torch.Tensor
    width: int

    def delta(self, slots: Sequence[int], x: torch.Tensor) -> torch.Tensor:
        """What is to be added to y, in float64."""
        y = torch.zeros(len(x), self.width, dtype=torch.float64)
        h = (x.double() @ self.a.double().t()).unflatten(1, self.cores.shape[1:3])
        h = torch.einsum("tmij,tmj->tmi", self.cores[list(slots)].double(), h)
        for m, (b, begin) in enumerate(zip(self.parts, self.begins, strict=True)):
            y[:, begin : begin + len(b)] = h[:, m] @ b.double().t()
        return y


def group_of(
    outs: Sequence[int], rank: int, inputs: int, dtype: torch.dtype, stored: torch.dtype
) -> Group:
    m = len(outs)
    size = m * rank * rank
    table = torch.randn(SLOTS, size + 7) / rank**0.5
    table[0] = 0
    begins = [GAP + sum(outs[:i]) + GAP * i for i in range(m)]
    return Group(
        (torch.randn(m * rank, inputs) / inputs**0.5).to(dtype),
        [torch.randn(out, rank).to(dtype) for out in outs],
        begins,
        table.to(stored)[:, 7:].view(SLOTS, m, rank, rank),
        begins[-1] + outs[-1] + GAP,
    )


def check(
    group: Group, decodes: Sequence[int], runs: Sequence[tuple[int, int]], shrunk: bool
) -> None:
    """Rows of decodes, then runs of (slot, count), added to a y with neighbours on all sides."""
    dtype = group.parts[0].dtype
    slots, spans = list(decodes), []
    for slot, count in runs:
        spans.append((slot, len(slots), len(slots) + count))
        slots += [slot] * count
    rows = SlotRows(torch.tensor(decodes, dtype=torch.int64), tuple(spans), 0, len(slots))
    x = torch.randn(len(slots), group.a.shape[1]).to(dtype)
    after = group.width + len(group.a)
    wide = torch.randn(len(slots), after + 5).to(dtype)
    y = wide[:, 2 : 2 + after]
    y[:, group.width :] = x.double() @ group.a.double().t()
    before = wide.clone()
    expected = y[:, : group.width].double() + group.delta(slots, x)
    if shrunk:
        delta = GroupDelta(group.parts, group.begins, group.cores)
        delta.add(y, y[:, group.width :], rows, lambda: None)
    else:
        delta = GroupDelta(group.parts, group.begins, group.cores, a=group.a)
        delta.add(y[:, : group.width], x, rows, lambda: None)
    assert close(y[:, : group.width], expected, dtype, 8)
    columns = torch.ones(wide.shape[1], dtype=torch.bool)
    for begin, b in zip(group.begins, group.parts, strict=True):
        columns[2 + begin : 2 + begin + len(b)] = False
    assert torch.equal(wide[:, columns], before[:, columns])


@pytest.fixture(params=["kernel", *OTHER_MACHINES, "torch"])
def form(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The kernel as this machine has it; as others do; torch's multiplies."""
    if request.param == "torch":
        monkeypatch.setattr(group_delta, "kernel_for", lambda *_: None)
    elif request.param == "kernel":
        assert kernel_for(torch.float32, torch.float32, CPU) is not None
    else:
        folder = tmp_path_factory.getbasetemp() / "library"
        folder.mkdir(exist_ok=True)
        other = build_library(folder, OTHER_MACHINES[request.param])
        monkeypatch.setattr(cpu_library, "cpu_library", lambda: other)
        monkeypatch.setattr(group_delta, "kernel_for", kernel_for.__wrapped__)
    return str(request.param)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),  # has no kernel
    ],
)
@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize(
    ("outs", "rank", "inputs"),
    [((48, 16, 16), 16, 64), ((7,), 1, 3), ((33, 5), 3, 17), ((64, 1), 64, 40), ((20,), 100, 96)],
)
def test_every_row_gets_its_own_delta(
    outs: tuple[int, ...],
    rank: int,
    inputs: int,
    shrunk: bool,
    dtype: torch.dtype,
    stored: torch.dtype,
    form: str,
) -> None:
    torch.manual_seed(rank)
    group = group_of(outs, rank, inputs, dtype, stored)
    for decodes in ([1], [0, 0], [3, 0, 1, 1, 4], [i % SLOTS for i in range(41)]):
        check(group, decodes, [], shrunk)
    check(group, [2, 0, 4], [(1, 5), (0, 2), (3, 1)], shrunk)
    check(group, [], [(4, 6)], shrunk)


@settings(max_examples=80, deadline=None)
@given(
    outs=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    rank=st.integers(1, 40),
    inputs=st.integers(1, 50),
    decodes=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=70),
    shrunk=st.booleans(),
)
def test_any_shape(
    outs: list[int], rank: int, inputs: int, decodes: list[int], shrunk: bool
) -> None:
    check(group_of(outs, rank, inputs, torch.float32, torch.float32), decodes, [], shrunk)


def test_numbers_that_are_none_stay_in_their_row(form: str) -> None:
    """An adapter whose cores overflow spoils its own rows, as NaN or infinity, and no others."""
    group = group_of((32, 16), 16, 24, torch.bfloat16, torch.bfloat16)
    group.cores[2] = torch.inf
    group.cores[3] = torch.nan
    y = torch.zeros(4, group.width, dtype=torch.bfloat16)
    x = torch.randn(4, 24).bfloat16()
    rows = SlotRows(torch.tensor([1, 2, 3, 0]), (), 0, 4)
    GroupDelta(group.parts, group.begins, group.cores, a=group.a).add(y, x, rows, lambda: None)
    assert y[0].isfinite().all() and y[0].any() and not y[3].any()
    assert not y[1].isfinite().all() and y[2].isnan().any()


@pytest.mark.parametrize("largest", [0, group_delta.LARGEST_BLOCK_B])
def test_expands_are_a_block_or_one_each(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_delta, "LARGEST_BLOCK_B", largest)
    group = group_of((6, 9), 4, 8, torch.float32, torch.float32)
    expands = expands_of(group.parts, group.begins)
    assert len(expands) == (1 if largest else 2)
    h, y = torch.randn(5, 8), torch.zeros(5, group.width)
    for expand in expands:
        expand.add(y, h)
    for m, (b, begin) in enumerate(zip(group.parts, group.begins, strict=True)):
        expected = h[:, 4 * m : 4 * m + 4].double() @ b.double().t()
        assert close(y[:, begin : begin + len(b)], expected, torch.float32)

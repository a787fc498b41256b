"""Packed layers, cores per row in every form, and the gathering of cores, against float64."""

import pytest
import torch
from closeness import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorasb_runtime.adapters.slots import SlotTable
from lorasb_runtime.engines.torch.core_rows import CoreRows
from lorasb_runtime.models.adapted_linear import ALL_ROWS
from lorasb_runtime.models.packed_linear import PackedGroup, PackedLinear
from lorasb_runtime.models.shared_inputs import inputs_of, neighbours_with_one_input, watch_calls
from lorasb_runtime.ops import dense as dense_module
from lorasb_runtime.ops.core_matmul import SlotRows, apply_cores, expand_add, shrink
from lorasb_runtime.ops.dense import compute_dtype, pack_weight

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 32, 200])
def test_a_packed_layer_is_the_layer(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(320, 272, bias=bias).to(dtype).requires_grad_(False)
    packed = pack_weight(layer.weight)
    if compute_dtype(dtype, CPU) != dtype:  # this CPU has no instructions for it
        assert packed is None
        return
    assert packed is not None
    found = PackedLinear(layer, PackedGroup([layer], packed), 0)
    assert found.weight.shape == layer.weight.shape and found.weight.is_meta
    x = torch.randn(1, rows, 320).to(dtype)
    expected = x.double() @ layer.weight.double().t()
    if bias:
        expected += layer.bias.double()
    assert close(found(x), expected, dtype, 16)


class FixedRows:
    """Slot 1 for every row of `rows`, out of 7: those up to the fourth decode, where row 0 does."""

    def __init__(self, rows: slice | None) -> None:
        self.rows = rows
        begin, end, _ = (rows or slice(0)).indices(7)
        decodes = 0 if begin else min(end, 4)
        slots = torch.ones(decodes, dtype=torch.int64)
        self.slot_rows = SlotRows(slots, ((1, max(begin, decodes), end),), begin, end)

    def own(self) -> None:
        return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [ALL_ROWS, slice(0, 3), slice(0, 5), slice(1, 5), None])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("middle", [96, 100])  # whole blocks of 16, or not
def test_a_packed_group_is_its_layers_with_their_adapters(
    middle: int, adapted: tuple[int, ...], rows: slice | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    biased = [(272, True), (middle, False), (160, True)]
    layers = [nn.Linear(320, n, b).to(dtype).requires_grad_(False) for n, b in biased]
    packed = pack_weight(torch.cat([layer.weight for layer in layers]))
    if packed is None:
        assert compute_dtype(dtype, CPU) != dtype  # this CPU has no instructions for it
        return
    group = PackedGroup(layers, packed)
    pairs = [
        (m, torch.randn(4, 320).to(dtype), torch.randn(layers[m].out_features, 4).to(dtype))
        for m in adapted
    ]
    cores = torch.randn(2, len(adapted), 4, 4).to(dtype)
    group.adapt(adapted, [(a, b) for _, a, b in pairs], cores, FixedRows(rows))
    assert group.adapted
    x = torch.randn(1, 7, 320).to(dtype)
    seats = [PackedLinear(layer, group, m) for m, layer in enumerate(layers)]
    expected = []
    for layer in layers:
        y = x.double() @ layer.weight.double().t()
        expected.append(y if layer.bias is None else y + layer.bias.double())
    for (m, a, b), core in zip(pairs, cores[1], strict=True):
        if rows is not None:
            delta = b.double() @ core.double() @ a.double()
            expected[m][:, rows] += x[:, rows].double() @ delta.t()
    for seat, wanted in zip(seats, expected, strict=True):
        assert close(seat(x), wanted, dtype, 16)
    other = torch.randn(1, 7, 320).to(dtype)  # whoever asks, and in whatever order
    alone = seats[1](other)
    again = seats[1](x)
    assert not torch.equal(alone, again) and close(again, expected[1], dtype, 16)


def test_small_weights_stay_as_they_are() -> None:
    assert pack_weight(torch.randn(64, 64)) is None


def test_without_instructions_16_bit_floats_are_held_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_module, "_native", lambda dtype: dtype == torch.float32)
    assert [compute_dtype(d, CPU) for d in DTYPES] == [torch.float32] * 3
    assert compute_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(dense_module, "_native", lambda dtype: True)
    assert [compute_dtype(d, CPU) for d in DTYPES] == DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "rank"), [(1, 1), (1, 64), (2, 4), (3, 32)])
def test_each_row_gets_its_own_core(rank: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rank)
    size = group * rank * rank
    table = torch.randn(6, 3 * size)
    table[0] = 0
    cores = table.to(dtype)[:, size : 2 * size].view(6, group, rank, rank)
    slots = [3, 0, 5, 1, 3] + [0] * 4 + [2] * 7
    h = torch.randn(len(slots), group, rank).to(dtype)
    expected = torch.einsum("tmij,tmj->tmi", cores[slots].double(), h.double())
    rows = SlotRows(torch.tensor(slots[:5]), ((0, 5, 9), (2, 9, 16)), 0, 16)
    assert close(apply_cores(h, cores, rows), expected, dtype)
    gathered = cores[slots[:5]].contiguous()
    assert close(apply_cores(h, cores, rows, gathered), expected, dtype)
    every = SlotRows(torch.tensor(slots), (), 0, 16)
    assert close(apply_cores(h, cores, every), expected, dtype)
    tail = SlotRows(torch.tensor([], dtype=torch.int64), ((0, 0, 5), (2, 9, 16)), 9, 16)
    assert close(apply_cores(h[9:], cores, tail), expected[9:], dtype)


def test_the_whole_formula() -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(5, 12), torch.randn(3, 12), torch.randn(7, 3)
    w, core = torch.randn(7, 12), torch.randn(2, 1, 3, 3)
    rows = SlotRows(torch.tensor([1, 1, 1, 1, 1]), (), 0, 5)
    h = apply_cores(shrink(x, a).view(5, 1, 3), core, rows)
    found = expand_add(x @ w.t(), h[:, 0], b)
    expected = x.double() @ (w.double() + b.double() @ core[1, 0].double() @ a.double()).t()
    assert close(found, expected, torch.float32)


STEP = st.tuples(
    st.lists(st.integers(0, 4), max_size=6),  # the decoding rows' slots
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=3),  # prefill chunks
    st.integers(1, 4),  # a slot that gets new cores before the step
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEP, min_size=1, max_size=6), gathered=st.booleans())
def test_gathered_cores_follow_the_slots(
    steps: list[tuple[list[int], list[tuple[int, int]], int]], gathered: bool
) -> None:
    """Whatever runs and whoever is swapped, each row is multiplied by what is in its slot now."""
    sizes = [(2, 3), (1, 4)]
    table = SlotTable(5, sum(m * r * r for m, r in sizes), torch.float32, CPU)
    batch = CoreRows(table, sizes, torch.float32)
    batch.gathered = gathered
    for decodes, chunks, swapped in steps:
        table.cores[swapped].normal_()
        table.fills[swapped] += 1
        slots, runs = list(decodes), []
        for slot, count in chunks:
            runs.append((slot, len(slots), len(slots) + count))
            slots += [slot] * count
        batch.prepare(decodes, runs)
        if batch.rows is None:
            assert not any(slots)
            continue
        start, stop, _ = batch.rows.indices(len(slots))
        assert not any(slots[:start]) and not any(slots[stop:])
        at = 0
        for group, (m, r) in enumerate(sizes):
            cores = table.cores[:, at : at + m * r * r].view(5, m, r, r)
            at += m * r * r
            h = torch.randn(stop - start, m, r)
            found = apply_cores(h, cores, batch.slot_rows, batch.own(group))
            expected = torch.einsum("tmij,tmj->tmi", cores[slots[start:stop]].double(), h.double())
            assert close(found, expected, torch.float32)


def test_neighbours_that_read_one_tensor_are_found() -> None:
    layers = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("q", "k", "o", "gate", "idle", "twice")})
    names = list(layers)
    x = torch.randn(2, 4)
    with watch_calls(layers, names) as calls:
        y = layers["q"](x) + layers["k"](x)
        layers["gate"](layers["o"](y))
        layers["twice"](layers["twice"](y))
    assert neighbours_with_one_input(names, inputs_of(calls)) == [
        ["q", "k"],
        ["o"],
        ["gate"],
        ["idle"],
        ["twice"],
    ]

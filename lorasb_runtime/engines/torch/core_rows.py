"""The cores of the rows that run, brought from the slot table once for many layers and steps."""

from collections.abc import Sequence as Rows
from itertools import takewhile

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_runtime.adapters.slots import BASE_SLOT, SlotTable
from lorasb_runtime.models.adapted_linear import ALL_ROWS, adapt_layer
from lorasb_runtime.models.packed_linear import PackedGroup, PackedLinear
from lorasb_runtime.ops.core_cpu import kernel_for
from lorasb_runtime.ops.core_matmul import SlotRows, apply_cores, shrink
from lorasb_runtime.ops.dense import matvec_dtype
from lorasb_runtime.storage.basis_file import Basis

# Up to so many decoding rows of one adapter are left to the kernel, which starts faster than the
# multiplies that share one core.
MOST_KERNEL_ROWS = 64
# Up to so many prompt tokens at once are handled as rows that decode, where the kernel takes them.
SHORT_RUN = 64


class GatheredCores:
    """The decoding rows' cores, each group in the dtype that it is multiplied in.

    One tensor [rows, m, r, r] for each group of m target modules. A row is copied only where its
    adapter has changed since the last step. Memory: D numbers for each row of the largest batch.
    """

    def __init__(self, slots: SlotTable, groups: list[tuple[int, int]], dtype: torch.dtype) -> None:
        """groups: (m, r) of each group, in the order of the slot table's columns."""
        self._slots = slots
        self._groups = groups
        self._dtypes = [matvec_dtype(r, dtype, slots.cores.device) for _, r in groups]
        self._sizes = [m * r * r for m, r in groups]
        self._held: list[tuple[int, int]] = []
        self._grow(0)

    def bring(self, slots: Rows[int]) -> None:
        """Make row i of every group the cores in slots[i]."""
        if len(slots) > len(self._held):
            self._grow(max(len(slots), 2 * len(self._held)))
        for row, slot in enumerate(slots):
            wanted = (slot, self._slots.fills[slot])
            if self._held[row] != wanted:
                source = self._slots.cores[slot].split(self._sizes)
                torch._foreach_copy_([t[row].view(-1) for t in self.tensors], list(source))
                self._held[row] = wanted

    def _grow(self, rows: int) -> None:
        device = self._slots.cores.device
        self.tensors = [
            torch.empty(rows, m, r, r, dtype=dtype, device=device)
            for (m, r), dtype in zip(self._groups, self._dtypes, strict=True)
        ]
        self._held = [(-1, -1)] * rows


class CoreRows:
    """What the step that is running multiplies by, shared by all adapted layers of one runner.

    `rows` are those that may have an adapter, None when no row has.
    """

    def __init__(self, slots: SlotTable, groups: list[tuple[int, int]], dtype: torch.dtype) -> None:
        self._slots = slots
        self._gathered = GatheredCores(slots, groups, dtype)
        self.dtype = dtype
        self.slot_rows = SlotRows(torch.zeros(0, dtype=torch.int64), (), 0, 0)
        self.rows: slice | None = None
        self._decodes: list[int] = []
        self._gathers = slots.cores.device.type == "cpu"
        self._brought = False
        self._kernel = kernel_for(dtype, slots.cores.dtype, slots.cores.device) is not None
        self.gathered = False  # whether a group has its rows' cores brought together

    def splits(self, count: int) -> bool:
        """Whether a chunk of so many tokens is taken for decoding rows, and is to come first."""
        return self._kernel and not self.gathered and count <= SHORT_RUN

    def prepare(self, decodes: list[int], runs: list[tuple[int, int, int]]) -> None:
        """decodes: the decoding rows' slots. runs: (slot, start, end) of the prefill chunks.

        Those first chunks that it `splits` are decoding rows to it.
        Rows of the base model's slot before the first adapter's row and after the last cost
        nothing.
        """
        total = runs[-1][2] if runs else len(decodes)
        short = list(takewhile(lambda run: self.splits(run[2] - run[1]), runs))
        runs = runs[len(short) :]
        decodes = [*decodes, *(slot for slot, start, end in short for _ in range(start, end))]
        count = len(decodes)
        dense = not self._kernel or count > MOST_KERNEL_ROWS or not any(decodes)
        if dense and len(set(decodes)) == 1:  # one multiply for all, or none
            runs = [(decodes[0], 0, count), *runs]
            decodes = []
        adapted = [(start, end) for slot, start, end in runs if slot != BASE_SLOT]
        if decodes:
            adapted.append((0, count))
        self.rows = None
        if not adapted:
            return
        begin, end = min(start for start, _ in adapted), max(end for _, end in adapted)
        self.rows = ALL_ROWS if (begin, end) == (0, total) else slice(begin, end)
        device = self._slots.cores.device
        slots = torch.tensor(decodes, dtype=torch.int64, device=device)
        self.slot_rows = SlotRows(slots, tuple(runs), begin, end)
        self._decodes, self._brought = decodes, False

    def decode(self, slots: torch.Tensor | None) -> None:
        """All rows decode; slots: int64 [n] on the device, which layers read when they run.

        None: no row has an adapter.
        """
        self.rows = None if slots is None else ALL_ROWS
        if slots is not None:
            self.slot_rows = SlotRows(slots, (), 0, slots.shape[0])
            self._decodes = []

    def own(self, group: int) -> torch.Tensor | None:
        """The decoding rows' cores [decodes, m, r, r], or None where they are not gathered.

        They are brought for all groups when the first one asks.
        """
        if not self._gathers or not self._decodes:
            return None
        if not self._brought:
            self._gathered.bring(self._decodes)
            self._brought = True
        return self._gathered.tensors[group][: len(self._decodes)]


class GroupSlots:
    """Where m neighbouring target modules of one rank, which read the same x, have their cores."""

    def __init__(
        self, batch: CoreRows, index: int, basis: Basis, members: Rows[int], slots: SlotTable
    ) -> None:
        """members: places in the basis' targets, one after the other."""
        self.modules = [basis.targets[i].module for i in members]
        rank = basis.targets[members[0]].rank
        span = slots.cores[:, basis.offsets[members[0]] : basis.offsets[members[-1] + 1]]
        self.cores = span.view(-1, len(members), rank, rank)
        self._batch = batch
        self._index = index

    @property
    def rows(self) -> slice | None:
        return self._batch.rows

    @property
    def slot_rows(self) -> SlotRows:
        return self._batch.slot_rows

    def own(self) -> torch.Tensor | None:
        """As `CoreRows.own` gives them."""
        return self._batch.own(self._index)


class GroupCores:
    """R A x of a group, computed once for all its members. a: [m * r, in]."""

    def __init__(self, slots: GroupSlots, a: torch.Tensor) -> None:
        self.slots = slots
        self._a = a
        self._x: torch.Tensor | None = None
        self._out: tuple[torch.Tensor, ...] = ()

    def compute(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """The member's R A x for the rows that may have an adapter: [n, r]."""
        if x is not self._x:
            flat, rows, cores = x.reshape(-1, x.shape[-1]), self.slots.rows, self.slots.cores
            assert rows is not None
            h = shrink(flat if rows is ALL_ROWS else flat[rows], self._a)
            h = h.unflatten(1, cores.shape[1:3])
            self._out = apply_cores(h, cores, self.slots.slot_rows, self.slots.own()).unbind(1)
            self._x = x
        out = self._out[member]
        if member + 1 == len(self._out):
            self._x, self._out = None, ()
        return out


class SlotCores:
    """One target module's seat in its group."""

    def __init__(self, group: GroupCores, member: int) -> None:
        self._group = group
        self._member = member

    @property
    def rows(self) -> slice | None:
        return self._group.slots.rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.compute(x, self._member)


def adapt_for_slots(
    model: PreTrainedModel, basis: Basis, slots: SlotTable, shared: list[list[str]]
) -> CoreRows:
    """Make the model's targets take each row's core from the slot that `prepare` names.

    shared: the targets in the basis' order, those together that read the same input.
    """
    place = {t.module: i for i, t in enumerate(basis.targets)}
    groups: list[list[int]] = []
    for names in shared:
        for name in names:
            index = place[name]
            first = groups[-1][0] if groups and name != names[0] else None
            if first is not None and basis.targets[first].rank == basis.targets[index].rank:
                groups[-1].append(index)
            else:
                groups.append([index])
    sizes = [(len(g), basis.targets[g[0]].rank) for g in groups]
    batch = CoreRows(slots, sizes, model.dtype)
    for number, members in enumerate(groups):
        own = GroupSlots(batch, number, basis, members, slots)
        if not _adapt_packed(model, basis, own):
            _adapt_each(model, basis, own)
            batch.gathered = True
    return batch


def _adapt_packed(model: PreTrainedModel, basis: Basis, slots: GroupSlots) -> bool:
    """Inside their packed group, where they are the members of one that has no others' cores."""
    seats = [model.get_submodule(name) for name in slots.modules]
    group = _common_group(seats)
    if group is None or group.adapted:
        return False
    members = [seat.member for seat in seats if isinstance(seat, PackedLinear)]
    pairs = [(basis.a(name), basis.b(name)) for name in slots.modules]
    group.adapt(members, pairs, slots.cores, slots)
    return True


def _adapt_each(model: PreTrainedModel, basis: Basis, slots: GroupSlots) -> None:
    shrinks = [basis.a(name) for name in slots.modules]
    cores = GroupCores(slots, torch.cat(shrinks).to(model.device, model.dtype))
    for member, name in enumerate(slots.modules):
        adapt_layer(model, basis, name, SlotCores(cores, member))


def _common_group(layers: list[nn.Module]) -> PackedGroup | None:
    """The packed group in which all these layers have their seats, if there is one."""
    groups = {layer.group if isinstance(layer, PackedLinear) else None for layer in layers}
    return groups.pop() if len(groups) == 1 else None

"""The cores of the rows that run, brought from the slot table once for many layers and steps."""

from collections.abc import Sequence as Rows

import torch

from lorasb_runtime.adapters.slots import BASE_SLOT, SlotTable
from lorasb_runtime.models.adapted_linear import ALL_ROWS
from lorasb_runtime.ops.core_matmul import SlotRows, apply_cores, shrink
from lorasb_runtime.storage.basis_file import Basis


class GatheredCores:
    """The decoding rows' cores, in the dtype that they are multiplied in.

    One tensor [rows, m, r, r] for each group of m target modules. A row is copied only where its
    adapter has changed since the last step. Memory: D numbers for each row of the largest batch.
    """

    def __init__(self, slots: SlotTable, groups: list[tuple[int, int]], dtype: torch.dtype) -> None:
        """groups: (m, r) of each group, in the order of the slot table's columns."""
        self._slots = slots
        self._groups = groups
        self._dtype = dtype
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
            torch.empty(rows, m, r, r, dtype=self._dtype, device=device) for m, r in self._groups
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
        self._gather = False

    def prepare(self, decodes: list[int], runs: list[tuple[int, int, int]]) -> None:
        """decodes: the decoding rows' slots. runs: (slot, start, end) of the prefill chunks.

        Rows of the base model's slot before the first adapter's row and after the last cost
        nothing.
        """
        count = len(decodes)
        total = runs[-1][2] if runs else count
        if len(set(decodes)) == 1:  # one dense multiply for all
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
        self._gather = bool(decodes) and device.type == "cpu"
        if self._gather:
            self._gathered.bring(decodes)

    def own(self, group: int) -> torch.Tensor | None:
        """The decoding rows' cores [decodes, m, r, r], or None where they are not gathered."""
        return self._gathered.tensors[group][: self.slot_rows.decodes] if self._gather else None


class GroupCores:
    """R A x of m neighbouring target modules that read the same x, computed once for all."""

    def __init__(
        self, batch: CoreRows, index: int, basis: Basis, members: Rows[int], slots: SlotTable
    ) -> None:
        """members: places in the basis' targets, one after the other and of one rank."""
        self.batch = batch
        self._index = index
        self._size = len(members)
        self._rank = basis.targets[members[0]].rank
        stacked = torch.cat([basis.a(basis.targets[i].module) for i in members])
        self._a = stacked.to(slots.cores.device, batch.dtype)
        span = slots.cores[:, basis.offsets[members[0]] : basis.offsets[members[-1] + 1]]
        self._cores = span.view(-1, self._size, self._rank, self._rank)
        self._x: torch.Tensor | None = None
        self._out: tuple[torch.Tensor, ...] = ()

    def compute(self, x: torch.Tensor, member: int) -> torch.Tensor:
        if x is not self._x:
            flat = x.reshape(-1, x.shape[-1])
            rows = self.batch.rows
            assert rows is not None
            h = shrink(flat if rows is ALL_ROWS else flat[rows], self._a)
            h = h.view(-1, self._size, self._rank)
            own = self.batch.own(self._index)
            self._out = apply_cores(h, self._cores, self.batch.slot_rows, own).unbind(1)
            self._x = x
        out = self._out[member]
        if member + 1 == self._size:
            self._x, self._out = None, ()
        return out


class SlotCores:
    """One target module's seat in its group."""

    def __init__(self, group: GroupCores, member: int) -> None:
        self._group = group
        self._batch = group.batch
        self._member = member

    @property
    def rows(self) -> slice | None:
        return self._batch.rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.compute(x, self._member)


def slot_cores(
    basis: Basis, slots: SlotTable, dtype: torch.dtype, shared: list[list[str]]
) -> tuple[CoreRows, list[SlotCores]]:
    """The cores' side of every target, in the basis' order; `shared`: who reads the same input."""
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
    batch = CoreRows(slots, sizes, dtype)
    cores = []
    for number, members in enumerate(groups):
        group = GroupCores(batch, number, basis, members, slots)
        cores += [SlotCores(group, member) for member in range(len(members))]
    return batch, cores

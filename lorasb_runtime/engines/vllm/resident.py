"""The cores that one worker has on its device, and which row of the batch takes which.

Knows no vllm. A worker holds the cores of the targets on its own pipeline rank; tensor-parallel
ranks hold the same.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch

from lorasb_runtime.adapters.slots import BASE_SLOT, SlotTable
from lorasb_runtime.engines.torch.core_rows import CoreRows
from lorasb_runtime.engines.vllm.placement import Group
from lorasb_runtime.errors import EngineError
from lorasb_runtime.storage.basis_file import Basis

DENSE_RUN = 16  # neighbouring rows of one slot from which on they are multiplied as one matrix
PADDING = 256


class ResidentCores:
    """slots: the table of cores, [1 + adapters, D of this rank], slot 0 all zeros.

    rows: what the CPU path multiplies by, brought once for each composition of the batch.
    token_slots: int64, max_tokens and more: each row's slot, at a fixed address for CUDA graphs;
    rows after the batch are of slot 0. order: int64 [tokens], the batch's rows with the decoding
    ones first, where they do not come so anyway.
    """

    def __init__(
        self,
        basis: Basis,
        groups: Sequence[Group],
        *,
        adapters: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        spans = [(basis.offsets[t], basis.offsets[t + 1]) for g in groups for t in g.targets]
        self._spans = merge_spans(spans)
        self._size = basis.size
        local = sum(end - start for start, end in self._spans)
        self.slots = SlotTable(adapters + 1, local, dtype, device)
        # Brought in float32: a CPU multiplies batches of small matrices twice as fast as in bf16.
        shapes = [(len(g.targets), g.rank) for g in groups]
        self.rows = CoreRows(self.slots, shapes, torch.float32)
        self.on_device = device.type != "cpu"
        # With room for the rows that fill up a CUDA graph's batch or one of several ranks.
        longest = -(-max_tokens // PADDING) * PADDING
        self.token_slots = torch.zeros(longest, dtype=torch.int64, device=device)
        self.order: torch.Tensor | None = None
        self._starts = [0]
        for group in groups:
            size = len(group.targets) * group.rank**2
            self._starts.append(self._starts[-1] + size)
        self._leased: dict[str, int] = {}
        self._batch: tuple[int, ...] | None = None

    def cores(self, group: int, members: int, rank: int) -> torch.Tensor:
        """The table's columns of a group: [slots, m, r, r], a view."""
        columns = self.slots.cores[:, self._starts[group] : self._starts[group + 1]]
        return columns.view(-1, members, rank, rank)

    def activate(self, wanted: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The slots of these versions and of no others; cores: the basis' whole [D], scaled.

        Raises EngineError when there are more than slots, which vLLM's scheduler prevents.
        """
        for version in self._leased.keys() - wanted.keys():
            self.release(version)
        for version, cores in wanted.items():
            if version in self._leased:
                continue
            slot = self.slots.lease(version, self._local(cores))
            if slot is None:
                raise EngineError(
                    f"found {len(wanted)} adapters in one step, expected at most "
                    f"{self.slots.capacity} (max_loras)"
                )
            self._leased[version] = slot
            self._batch = None
        return dict(self._leased)

    def release(self, version: str) -> None:
        """The version is in no batch any more; it stays resident until its slot is needed."""
        slot = self._leased.pop(version, None)
        if slot is not None:
            self.slots.release(slot)

    def map_tokens(self, slots: tuple[int, ...]) -> None:
        """Each row's slot for the steps from now on; nothing is done where all is as before."""
        if slots == self._batch:
            return
        self._batch = slots
        if self.on_device:
            self._map_on_device(slots)
        else:
            self._map_rows(slots)

    def _map_on_device(self, slots: tuple[int, ...]) -> None:
        """Without waiting for the device: pinned memory is not used again before it is read."""
        size, pinned = self.token_slots.shape[0], self.token_slots.device.type == "cuda"
        fresh = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)
        fresh[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
        self.token_slots.copy_(fresh, non_blocking=True)

    def _map_rows(self, slots: tuple[int, ...]) -> None:
        decodes, runs = split_rows(slots)
        order = [row for row, _ in decodes]
        for _, start, end in runs:
            order.extend(range(start, end))
        at = len(decodes)
        moved = []
        for slot, start, end in runs:
            moved.append((slot, at, at + end - start))
            at += end - start
        self.rows.prepare([slot for _, slot in decodes], moved)
        in_order = all(i == row for i, row in enumerate(order))
        self.order = None if in_order else torch.tensor(order, dtype=torch.int64)

    def _local(self, cores: torch.Tensor) -> torch.Tensor:
        if cores.numel() != self._size:
            raise EngineError(f"found {cores.numel()} core numbers, expected {self._size}")
        if self._spans == [(0, self._size)]:
            return cores
        return torch.cat([cores[start:end] for start, end in self._spans])


def merge_spans(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same spans in the same order, neighbours joined."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def split_rows(
    slots: Sequence[int],
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Rows that take their own core as (row, slot), and long runs as (slot, start, end)."""
    single: list[tuple[int, int]] = []
    runs: list[tuple[int, int, int]] = []
    at = 0
    for slot, same in groupby(slots):
        count = len(list(same))
        if count >= DENSE_RUN:
            runs.append((slot, at, at + count))
        else:
            single.extend((row, slot) for row in range(at, at + count))
        at += count
    return single, runs


def base_rows(tokens: Sequence[int], slot_of: Mapping[int, int]) -> tuple[int, ...]:
    """Slots of the rows, given the adapter's number of each (0: the base model)."""
    return tuple(slot_of[token] if token else BASE_SLOT for token in tokens)

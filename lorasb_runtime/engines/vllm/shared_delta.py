"""The delta of one group of fused modules, B (R (A x)), added to what vLLM's layer gives.

Knows no vllm. On CPU in plain torch; elsewhere in tensor operations alone, without a look at their
values, so that they can be traced by torch.compile and captured in CUDA graphs.
"""

from collections.abc import Sequence

import torch

from lorasb_runtime.engines.torch.core_rows import CoreRows
from lorasb_runtime.engines.vllm.resident import ResidentCores
from lorasb_runtime.engines.vllm.sharding import Expand
from lorasb_runtime.models.adapted_linear import ALL_ROWS
from lorasb_runtime.ops.core_kernel import kernel_works, slot_matvec
from lorasb_runtime.ops.core_matmul import SlotRows, apply_cores, expand_add, shrink


class SharedDelta:
    """a: [m * r, in], the members' A one under the other. expands: their B, as of `expands_of`.

    Both are this tensor-parallel rank's part, in the dtype of the activations, and no buffers of a
    module: they are looked up for every layer in every step.
    """

    def __init__(
        self,
        a: torch.Tensor,
        expands: Sequence[Expand],
        resident: ResidentCores,
        group: int,
        shape: tuple[int, int],
    ) -> None:
        """group: its number among the resident cores' groups. shape: (m, r)."""
        self.a = a
        self.expands = tuple((e.b, e.start, e.row) for e in expands)
        self.members, self.rank = shape
        self.resident = resident
        self._group = group
        self._cores = resident.cores(group, *shape)
        self._on_device = resident.on_device
        self._batch: SlotRows | None = None
        self._own: torch.Tensor | None = None  # of that batch
        self._kernel = a.device.type == "cuda" and kernel_works(
            self.members, self.rank, a.dtype, self._cores.dtype, a.device
        )

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """output [tokens, out] + B (R (A x)), each row by its own slot's R; x: [tokens, in].

        In place.
        """
        if self._on_device:
            self._add_traced(output, x)
        elif self.resident.rows.rows is not None:
            self._add_rows(output, x, self.resident.rows)
        return output

    def _add_traced(self, output: torch.Tensor, x: torch.Tensor) -> None:
        slots = self.resident.token_slots[: x.shape[0]]
        h = shrink(x, self.a).view(-1, self.members, self.rank)
        if self._kernel:
            h = torch.ops.lorasb.slot_matvec(h, self._cores, slots)
        else:
            h = torch.matmul(self._cores.index_select(0, slots).to(h.dtype), h.unsqueeze(-1))
        self._expand(output, h.reshape(x.shape[0], -1))

    def _add_rows(self, output: torch.Tensor, x: torch.Tensor, rows: CoreRows) -> None:
        if rows.slot_rows is not self._batch:
            self._batch, self._own = rows.slot_rows, self._all_decoding(rows)
        if self._own is not None and x.shape[0] == self._own.shape[0]:
            h = shrink(x, self.a).to(rows.dtype)
            h = torch.bmm(h.view(-1, 1, self.rank), self._own.flatten(0, 1))
            self._expand(output, h.view(x.shape[0], -1).to(x.dtype))
        else:
            self._add_mixed(output, x, rows)

    def _all_decoding(self, rows: CoreRows) -> torch.Tensor | None:
        """The rows' transposed cores where each row has its own: the commonest batch."""
        own = rows.own(self._group)
        if own is None or rows.slot_rows.runs or self.resident.order is not None:
            return None
        return own.transpose(2, 3)

    def _add_mixed(self, output: torch.Tensor, x: torch.Tensor, rows: CoreRows) -> None:
        begin, end = rows.slot_rows.begin, rows.slot_rows.end
        order = self.resident.order
        part, target = x, output
        if order is not None:
            part = x.index_select(0, order[begin:end])
            target = output.new_zeros(end - begin, output.shape[1])
        elif rows.rows != ALL_ROWS or x.shape[0] != end:
            part, target = x[begin:end], output[begin:end]
        h = shrink(part, self.a).to(rows.dtype).view(-1, self.members, self.rank)
        h = apply_cores(h, self._cores, rows.slot_rows, rows.own(self._group))
        self._expand(target, h.reshape(-1, self.members * self.rank).to(x.dtype))
        if order is not None:
            output.index_add_(0, order[begin:end], target)

    def _expand(self, output: torch.Tensor, h: torch.Tensor) -> None:
        for b, start, row in self.expands:
            rows, columns = b.shape
            part = h if columns == h.shape[1] else h[:, start : start + columns]
            whole = rows == output.shape[1]
            expand_add(output if whole else output[:, row : row + rows], part, b)


@torch.library.custom_op("lorasb::slot_matvec", mutates_args=())
def _slot_matvec(h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The kernel of `ops.core_kernel` as one operator, which torch.compile does not look into."""
    return slot_matvec(h, cores, slots)


@_slot_matvec.register_fake
def _(h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return h.new_empty(h.shape)

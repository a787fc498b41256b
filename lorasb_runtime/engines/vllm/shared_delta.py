"""The delta of one group of fused modules, B (R (A x)), added to what vLLM's layer gives.

Knows no vllm. On CPU in plain torch; elsewhere in tensor operations alone, without a look at their
values, so that they can be traced by torch.compile and captured in CUDA graphs.
"""

import torch
from torch import nn

from lorasb_runtime.engines.torch.core_rows import CoreRows
from lorasb_runtime.engines.vllm.resident import ResidentCores
from lorasb_runtime.models.adapted_linear import ALL_ROWS
from lorasb_runtime.ops.core_kernel import kernel_works, slot_matvec
from lorasb_runtime.ops.core_matmul import apply_cores, expand_add, shrink


class SharedDelta(nn.Module):
    """a: [m * r, in], the members' A one under the other. b: [out, m * r] as of `block_b`.

    Both are this tensor-parallel rank's part, in the dtype of the activations.
    """

    a: torch.Tensor
    b: torch.Tensor

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        resident: ResidentCores,
        group: int,
        shape: tuple[int, int],
    ) -> None:
        """group: its number among the resident cores' groups. shape: (m, r)."""
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        self.members, self.rank = shape
        self.resident = resident
        self._group = group
        self._cores = resident.cores(group, *shape)
        self._on_device = resident.on_device
        self._kernel = a.device.type == "cuda" and kernel_works(
            self.members, self.rank, a.dtype, self._cores.dtype, a.device
        )

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """output [tokens, out] + B (R (A x)), each row by its own slot's R; x: [tokens, in]."""
        if self._on_device:
            return self._add_traced(output, x)
        rows = self.resident.rows
        if rows.rows is not None:
            self._add_rows(output, x, rows)
        return output

    def _add_traced(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        slots = self.resident.token_slots[: x.shape[0]]
        h = shrink(x, self.a).view(-1, self.members, self.rank)
        if self._kernel:
            h = torch.ops.lorasb.slot_matvec(h, self._cores, slots)
        else:
            h = torch.matmul(self._cores.index_select(0, slots).to(h.dtype), h.unsqueeze(-1))
        return expand_add(output, h.reshape(x.shape[0], -1), self.b)

    def _add_rows(self, output: torch.Tensor, x: torch.Tensor, rows: CoreRows) -> None:
        begin, end = rows.slot_rows.begin, rows.slot_rows.end
        order = self.resident.order
        part = x
        if order is not None:
            part = x.index_select(0, order[begin:end])
        elif rows.rows != ALL_ROWS or x.shape[0] != end:
            part, output = x[begin:end], output[begin:end]
        h = shrink(part, self.a).view(-1, self.members, self.rank)
        h = apply_cores(h, self._cores, rows.slot_rows, rows.own(self._group))
        h = h.reshape(-1, self.members * self.rank)
        if order is None:
            expand_add(output, h, self.b)
        else:
            output.index_add_(0, order[begin:end], torch.mm(h, self.b.t()))


@torch.library.custom_op("lorasb::slot_matvec", mutates_args=())
def _slot_matvec(h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The kernel of `ops.core_kernel` as one operator, which torch.compile does not look into."""
    return slot_matvec(h, cores, slots)


@_slot_matvec.register_fake
def _(h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return h.new_empty(h.shape)

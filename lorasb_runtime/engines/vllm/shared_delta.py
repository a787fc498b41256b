"""The delta of one group of fused modules, B (R (A x)), added to what vLLM's layer gives.

Knows no vllm. On CPU in plain torch; elsewhere in tensor operations alone, without a look at their
values, so that they can be traced by torch.compile and captured in CUDA graphs.
"""

from collections.abc import Sequence
from functools import partial

import torch

from lorasb_runtime.engines.vllm.resident import ResidentCores
from lorasb_runtime.models.adapted_linear import ALL_ROWS
from lorasb_runtime.ops.core_kernel import kernel_works, slot_matvec
from lorasb_runtime.ops.core_matmul import shrink
from lorasb_runtime.ops.group_delta import GroupDelta


class SharedDelta:
    """The group's pair and cores, held here, as its layer's buffers would be looked up each step.

    All are this tensor-parallel rank's part, in the dtype of the activations.
    """

    def __init__(
        self,
        a: torch.Tensor,
        parts: Sequence[torch.Tensor],
        begins: Sequence[int],
        resident: ResidentCores,
        group: int,
    ) -> None:
        """a, parts, begins: as of `GroupDelta`. group: its number among the resident cores'."""
        self.resident = resident
        shape = len(parts), parts[0].shape[1]
        self._cores = resident.cores(group, *shape)
        self._delta = GroupDelta(parts, begins, self._cores, a=a)
        self._own = partial(resident.rows.own, group)
        self._kernel = a.device.type == "cuda" and kernel_works(
            *shape, a.dtype, self._cores.dtype, a.device
        )

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """output [tokens, out] + B (R (A x)), each row by its own slot's R; x: [tokens, in].

        In place.
        """
        if self.resident.on_device:
            self._add_traced(output, x)
        elif self.resident.rows.rows is not None:
            self._add_rows(output, x)
        return output

    def _add_traced(self, output: torch.Tensor, x: torch.Tensor) -> None:
        assert self._delta.a is not None
        slots = self.resident.token_slots[: x.shape[0]]
        h = shrink(x, self._delta.a).unflatten(1, self._cores.shape[1:3])
        if self._kernel:
            h = torch.ops.lorasb.slot_matvec(h, self._cores, slots)
        else:
            h = torch.matmul(self._cores.index_select(0, slots).to(h.dtype), h.unsqueeze(-1))
        h = h.reshape(x.shape[0], -1)
        for expand in self._delta.expands:
            expand.add(output, h)

    def _add_rows(self, output: torch.Tensor, x: torch.Tensor) -> None:
        batch, order = self.resident.rows, self.resident.order
        rows = batch.slot_rows
        begin, end = rows.begin, rows.end
        if order is not None:
            target = output.new_zeros(end - begin, output.shape[1])
            self._delta.add(target, x.index_select(0, order[begin:end]), rows, self._own)
            output.index_add_(0, order[begin:end], target)
        elif batch.rows is ALL_ROWS and len(x) == end:
            self._delta.add(output, x, rows, self._own)
        else:
            self._delta.add(output[begin:end], x[begin:end], rows, self._own)


@torch.library.custom_op("lorasb::slot_matvec", mutates_args=())
def _slot_matvec(h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The kernel of `ops.core_kernel` as one operator, which torch.compile does not look into."""
    return slot_matvec(h, cores, slots)


@_slot_matvec.register_fake
def _(h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return h.new_empty(h.shape)

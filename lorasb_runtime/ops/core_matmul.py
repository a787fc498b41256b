"""The one formula, y = W0 x + scaling * B (R (A x)), in the forms that its users need.

Scaling is applied once, to the core (`scale_core`): when a slot is filled (`resident_cores`), by
fold, export and training. No other function multiplies by it.
"""

from dataclasses import dataclass, replace

import torch

from lorasb_runtime.ops.core_kernel import slot_matvec, use_kernel
from lorasb_runtime.ops.dense import batched_matvec
from lorasb_runtime.ops.rounding import round_once


def scale_core(core: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * R, for a core [r, r] or a flat vector of cores [D].

    Unchanged at scaling 1; otherwise in float32 at least, so that nothing is rounded here.
    """
    if scaling == 1.0:
        return core
    return core.to(torch.promote_types(core.dtype, torch.float32)) * scaling


def resident_cores(cores: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """What a slot holds of an adapter's cores [D]: scaling * R, rounded once to `dtype`."""
    exact = cores if scaling == 1.0 else cores.double()
    return round_once(scale_core(exact, scaling), dtype)


def dense_delta(b: torch.Tensor, scaled_core: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """B @ R @ A as a full matrix [out, in]; `scaled_core` comes from `scale_core`."""
    return (b @ scaled_core) @ a


@dataclass(frozen=True)
class SlotRows:
    """Which slot each row of a ragged batch takes its core from.

    Rows 0..decodes are the decoding sequences, each with a slot of its own: `slots` int64
    [decodes], on the device. The rows after them come in runs (slot, start, end) that share a
    slot: the prefill chunks; so may all decoding rows, and `decodes` is 0 then.
    Rows outside begin..end are all of slot 0, the base model; begin == end: every row is.
    """

    slots: torch.Tensor
    runs: tuple[tuple[int, int, int], ...]
    begin: int
    end: int

    @property
    def decodes(self) -> int:
        return self.slots.shape[0]

    def after_decodes(self) -> "SlotRows":
        """The rows of the runs alone."""
        return replace(self, slots=self.slots[:0], begin=self.begin + self.decodes)


def apply_cores(
    h: torch.Tensor, cores: torch.Tensor, rows: SlotRows, own: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply rows begin..end by their own scaled cores, for m target modules at once: R h.

    h: [end - begin, m, r]; the result has its shape. cores: [slots, m, r, r], a view of the device
    table in any float dtype; slot 0 is zero. own: the decoding rows' cores [decodes, m, r, r] in
    any float dtype, contiguous, where someone has gathered them already.
    """
    parts = []
    if rows.decodes:
        parts.append(_multiply_decodes(h[: rows.decodes], cores, rows.slots, own))
    for slot, start, end in rows.runs:
        if start < rows.end and end > rows.begin:
            part = h[start - rows.begin : end - rows.begin]
            if slot:
                core = cores[slot].to(h.dtype)
                part = torch.bmm(part.transpose(0, 1), core.transpose(1, 2)).transpose(0, 1)
                parts.append(part)
            else:
                parts.append(torch.zeros_like(part))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _multiply_decodes(
    h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor, own: torch.Tensor | None
) -> torch.Tensor:
    """The decoding rows' part, in the form that suits the device; they differ in rounding alone."""
    if own is None and use_kernel(h, cores):
        return slot_matvec(h, cores, slots)
    r = h.shape[-1]
    if own is None:
        own = cores.index_select(0, slots).to(h.dtype)
    return batched_matvec(own.view(-1, r, r), h)


def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A x for every row: [rows, in] -> [rows, r]."""
    return torch.mm(x, a.t())


def expand_add(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + B h for every row, in place: [rows, out], [rows, r] -> [rows, out]."""
    return y.addmm_(h, b.t())

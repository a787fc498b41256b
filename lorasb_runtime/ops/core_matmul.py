"""The one formula, y = W0 x + scaling * B (R (A x)), in the forms that its users need.

Scaling is applied once, to the core (`scale_core`): by slots when an adapter is loaded, by fold,
export and training. No other function multiplies by it.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear


def scale_core(core: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * R, for a core [r, r] or a flat vector of cores [D].

    Unchanged at scaling 1; otherwise in float32 at least, so that nothing is rounded here.
    """
    if scaling == 1.0:
        return core
    return core.to(torch.promote_types(core.dtype, torch.float32)) * scaling


def dense_delta(b: torch.Tensor, scaled_core: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """B @ R @ A as a full matrix [out, in]; `scaled_core` comes from `scale_core`."""
    return (b @ scaled_core) @ a


@dataclass(frozen=True)
class SlotRows:
    """Which slot each row of a ragged batch takes its core from.

    The first `gathered.numel()` rows name their slots one by one (int64, on the device): the
    decoding sequences. The rows after them come in runs (slot, start, end) that share a slot: the
    prefill chunks. `any_adapter` is false when every row is of slot 0, the base model.
    """

    gathered: torch.Tensor
    runs: tuple[tuple[int, int, int], ...]
    any_adapter: bool


def apply_cores(h: torch.Tensor, cores: torch.Tensor, rows: SlotRows) -> torch.Tensor:
    """Multiply each row of `h` [tokens, r] by its own scaled core: R h.

    cores: [slots, r, r], a view of the device table; slot 0 is zero.
    """
    out = torch.empty_like(h)
    count = rows.gathered.numel()
    if count:
        own = cores.index_select(0, rows.gathered)
        out[:count] = torch.bmm(own, h[:count].unsqueeze(2)).squeeze(2)
    for slot, start, end in rows.runs:
        if slot:
            torch.mm(h[start:end], cores[slot].t(), out=out[start:end])
        else:
            out[start:end] = 0
    return out


def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A x for every row: [..., in] -> [..., r]."""
    return linear(x, a)


def expand_add(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + B h for every row: [..., out], [..., r] -> [..., out]."""
    return y + linear(h, b)

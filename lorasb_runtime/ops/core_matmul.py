"""The one formula, y = W0 x + scaling * B (R (A x)), in the forms that its users need.

Scaling is applied once, to the core (`scale_core`): by slots when an adapter is loaded, by fold,
export and training. No other function multiplies by it.
"""

from dataclasses import dataclass

import torch

from lorasb_runtime.ops.dense import batched_matvec, dense, dense_add


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
    count = rows.gathered.numel()
    own = cores.index_select(0, rows.gathered)
    decoded = batched_matvec(own, h[:count])
    if not rows.runs:
        return decoded
    parts = [decoded]
    for slot, start, end in rows.runs:
        part = h[start:end]
        parts.append(dense(part, cores[slot]) if slot else torch.zeros_like(part))
    return torch.cat(parts)


def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A x for every row: [..., in] -> [..., r]."""
    return dense(x, a)


def expand_add(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + B h for every row, in place: [..., out], [..., r] -> [..., out]."""
    return dense_add(y, h, b)

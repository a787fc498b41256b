"""Each decoding row times its own slot's core in one launch, without gathering the cores first.

Tested in Triton's interpreter. NOT YET RUN ON A GPU: block sizes are guesses, nothing is measured.
Imports without Triton, which is needed from the first call on.
"""

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)

# One program holds a tile of at most this many numbers of a core, at most LONGEST_ROW wide.
TILE = 2048
LONGEST_ROW = 256


def slot_matvec(h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """out[t, m] = cores[slots[t], m] @ h[t, m], in h's dtype, added up in float32.

    h: [n, m, r]. cores: [slots, m, r, r], any strided view of the table in any float dtype.
    slots: int64 [n] on the device, contiguous; rows of slot 0 give zeros and read nothing.
    """
    from lorasb_runtime.ops.core_triton import slot_matvec_kernel

    n, members, rank = h.shape
    assert cores.shape[1:] == (members, rank, rank)
    assert slots.shape == (n,) and slots.dtype == torch.int64 and slots.is_contiguous()
    out = torch.empty(n, members, rank, dtype=h.dtype, device=h.device)
    padded = 1 << (rank - 1).bit_length()
    block_j = min(padded, LONGEST_ROW)
    block_i = min(padded, TILE // block_j)
    with torch.cuda.device_of(h):  # Triton launches on the current device
        slot_matvec_kernel[n, members, -(-rank // block_i)](
            h,
            cores,
            slots,
            out,
            *h.stride(),
            *cores.stride(),
            members,
            rank=rank,
            block_i=block_i,
            block_j=block_j,
        )
    return out


def use_kernel(h: torch.Tensor, cores: torch.Tensor) -> bool:
    """Whether `slot_matvec` is the way to multiply these tensors."""
    if h.device.type != "cuda":
        return False
    return kernel_works(h.shape[1], h.shape[2], h.dtype, cores.dtype, h.device)


@cache
def kernel_works(
    members: int, rank: int, dtype: torch.dtype, stored: torch.dtype, device: torch.device
) -> bool:
    """Whether the kernel runs here and is right, tried once for each kind of group.

    Waits for the compiler and the device, at the first call alone. Where Triton is missing, finds
    no C compiler or gives other numbers than a plain multiply, a warning says so.
    """
    numbers = torch.linspace(-1, 1, members * rank * (rank + 3), device=device)
    h = numbers[: 3 * members * rank].view(3, members, rank).to(dtype)
    core = numbers[3 * members * rank :].view(members, rank, rank).to(stored)
    table = torch.stack([torch.full_like(core, torch.nan), core])
    expected = torch.einsum("mij,tmj->tmi", core.double(), h.double())
    expected[1] = 0
    try:
        found = slot_matvec(h, table, torch.tensor([1, 0, 1], device=device))
        off = (found.double() - expected).abs().max().item()
        allowed = max(4 * torch.finfo(dtype).eps, 1e-5) * max(1.0, expected.abs().max().item())
        if off <= allowed:
            return True
        reason = f"found numbers off by {off:.3g}, expected at most {allowed:.3g}"
    except Exception as error:  # whatever import, compiler, linker or driver raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    logger.warning("the core kernel is not used for rank %d in %s: %s", rank, dtype, reason)
    return False

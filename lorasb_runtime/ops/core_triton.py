"""The Triton kernel behind `core_kernel`; imported only where a kernel is wanted.

Tested in Triton's interpreter. NOT YET RUN ON A GPU.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def slot_matvec_kernel(
    h: tl.tensor,
    cores: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    h_row: tl.tensor,
    h_member: tl.tensor,
    h_column: tl.tensor,
    core_slot: tl.tensor,
    core_member: tl.tensor,
    core_row: tl.tensor,
    core_column: tl.tensor,
    members: tl.tensor,
    rank: tl.constexpr,
    block_i: tl.constexpr,
    block_j: tl.constexpr,
) -> None:
    """out[t, m, i] = sum over j of cores[slots[t], m, i, j] * h[t, m, j], added up in float32.

    Program (t, m, b) computes block b of block_i numbers. h: [n, members, rank] and cores:
    [slots, members, rank, rank] by their strides; slots: int64 [n], so that offsets into a large
    table do not overflow; out: contiguous. Nothing of the table is read for slot 0.
    """
    t = tl.program_id(0)
    m = tl.program_id(1)
    i = tl.program_id(2) * block_i + tl.arange(0, block_i)
    slot = tl.load(slots + t)
    columns = tl.where(slot == 0, 0, rank)  # slot 0: none, so that all of it is masked
    core = cores + slot * core_slot + m * core_member
    row = h + t * h_row + m * h_member
    sums = tl.zeros([block_i], dtype=tl.float32)
    for start in range(0, rank, block_j):
        j = start + tl.arange(0, block_j)
        inside = (i < rank)[:, None] & (j < columns)[None, :]
        places = i[:, None] * core_row + j[None, :] * core_column
        block = tl.load(core + places, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(row + j * h_column, mask=j < columns, other=0.0).to(tl.float32)
        sums += tl.sum(block * x[None, :], axis=1)
    place = out + (t * members + m) * rank + i
    tl.store(place, sums.to(out.dtype.element_ty), mask=i < rank)

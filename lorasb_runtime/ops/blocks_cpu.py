"""The layout in which the CPU kernels read a matrix: blocks of 16 outputs, as of `cpu/blocks.h`."""

import torch

LANES = 16  # outputs of a block
HELD = 32  # inputs of 16 bits that one of AMX's tiles holds


def pack_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[out, in] in blocks, flat; what fills up the last block and the depth is zero."""
    outputs, inputs = matrix.shape
    blocks, depth, each = _shape(outputs, inputs, matrix.dtype)
    padded = matrix
    if (blocks * LANES, depth) != (outputs, inputs):
        padded = matrix.new_zeros(blocks * LANES, depth)
        padded[:outputs, :inputs] = matrix
    parts = padded.reshape(blocks, LANES, depth // each, each)
    return parts.transpose(1, 2).contiguous().view(-1)


def unpack_blocks(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The matrix [out, in] that `pack_blocks` was given."""
    blocks, depth, each = _shape(outputs, inputs, packed.dtype)
    parts = packed.view(blocks, depth // each, LANES, each).transpose(1, 2)
    return parts.reshape(blocks * LANES, depth)[:outputs, :inputs]


def _shape(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """How many blocks, how many inputs each has, and how many of these lie together."""
    each = 4 // dtype.itemsize
    unit = HELD if each == 2 and inputs > HELD else each
    return -(-outputs // LANES), -(-inputs // unit) * unit, each

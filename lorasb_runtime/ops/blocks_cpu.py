"""The layout in which the CPU kernels read a matrix: blocks of outputs, as of `cpu/blocks.h`."""

import ctypes

import torch

from lorasb_runtime.ops.cpu_library import cpu_function

HELD = 32  # inputs of 16 bits that one of AMX's tiles holds


def pack_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[out, in] in blocks, flat; what fills up the last block and the depth is zero."""
    outputs, inputs = matrix.shape
    blocks, depth, each = _shape(outputs, inputs, matrix.dtype)
    padded = matrix
    if len(padded) != blocks * block_outputs() or depth != inputs:
        padded = matrix.new_zeros(blocks * block_outputs(), depth)
        padded[:outputs, :inputs] = matrix
    parts = padded.reshape(blocks, -1, depth // each, each)
    return parts.transpose(1, 2).contiguous().view(-1)


def unpack_blocks(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The matrix [out, in] that `pack_blocks` was given."""
    blocks, depth, each = _shape(outputs, inputs, packed.dtype)
    parts = packed.view(blocks, depth // each, -1, each).transpose(1, 2)
    return parts.reshape(-1, depth)[:outputs, :inputs]


def block_outputs() -> int:
    """Outputs of a block, which depend on the machine."""
    tell = cpu_function("block_outputs", (), torch.device("cpu"), [ctypes.c_void_p])
    assert tell is not None
    found = ctypes.c_int64()
    tell(ctypes.byref(found))
    return found.value


def _shape(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """How many blocks, how many inputs each has, and how many of these lie together."""
    each = 4 // dtype.itemsize
    unit = HELD if each == 2 and inputs > HELD else each
    return -(-outputs // block_outputs()), -(-inputs // unit) * unit, each

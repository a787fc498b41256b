"""The core kernel against einsum; run by test_core_kernel.py in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so the variable must be set before.
"""

import itertools
import sys

import torch

from lorasb_runtime.ops import core_matmul
from lorasb_runtime.ops.core_kernel import kernel_works, slot_matvec
from lorasb_runtime.ops.core_matmul import SlotRows, apply_cores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = torch.tensor([3, 0, 5, 1, 3, 0])


def table_view(members: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """[6, members, rank, rank] inside a wider table, NaN around it and in slot 0."""
    size = members * rank * rank
    table = torch.full((6, 3 * size + 5), torch.nan)
    table[1:, size : 2 * size] = torch.randn(5, size)
    return table.to(dtype)[:, size : 2 * size].view(6, members, rank, rank)


def reference(h: torch.Tensor, cores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    known = cores.double().clone()
    known[0] = 0
    return torch.einsum("tmij,tmj->tmi", known[slots], h.double())


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Within one rounding to the dtype, after sums in float32."""
    assert found.dtype == dtype and found.shape == expected.shape, name
    eps = torch.finfo(dtype).eps
    allowed = eps * expected.abs() + 1e-5 * max(1.0, float(expected.abs().max()))
    assert bool(((found.double() - expected).abs() <= allowed).all()), name


def every_shape_and_dtype() -> None:
    for rank, members, n in [
        (1, 3, 6),
        (3, 2, 6),
        (16, 1, 6),
        (64, 3, 3),
        (100, 1, 3),
        (256, 1, 2),
    ]:
        slots = SLOTS[:n]
        for dtype, stored in itertools.product(DTYPES, DTYPES if rank == 3 else [None]):
            cores = table_view(members, rank, stored or dtype)
            h = torch.randn(n, members, rank).to(dtype)
            name = f"rank {rank}, {members} members, {dtype} by {stored or dtype}"
            check(slot_matvec(h, cores, slots), reference(h, cores, slots), dtype, name)


def strides_sizes_and_overflow() -> None:
    cores = table_view(2, 5, torch.float32)
    h = torch.randn(7, 5, 2, len(SLOTS)).permute(3, 2, 1, 0)[..., 4]
    assert not h.is_contiguous()
    turned = cores.transpose(2, 3)
    check(slot_matvec(h, turned, SLOTS), reference(h, turned, SLOTS), torch.float32, "strides")
    assert slot_matvec(h[:0], cores, SLOTS[:0]).shape == (0, 2, 5)
    wide = table_view(1, 300, torch.float32)  # more than one block of columns
    h = torch.randn(2, 1, 300)
    check(slot_matvec(h, wide, SLOTS[:2]), reference(h, wide, SLOTS[:2]), torch.float32, "wide")
    h = torch.full((1, 1, 300), torch.inf)
    assert slot_matvec(h, wide, torch.tensor([0])).eq(0).all()


def the_same_function_uses_it() -> None:
    core_matmul.use_kernel = lambda h, cores: True
    cores = table_view(2, 16, torch.float32)
    slots = [*SLOTS.tolist(), 0, 0, 2, 2, 2]
    rows = SlotRows(SLOTS, ((0, 6, 8), (2, 8, 11)), 0, 11)
    h = torch.randn(11, 2, 16)
    expected = reference(h, cores, torch.tensor(slots))
    check(apply_cores(h, cores, rows), expected, torch.float32, "apply_cores")


def it_checks_itself() -> None:
    for dtype, stored in itertools.product(DTYPES, DTYPES):
        for rank in (1, 20):
            assert kernel_works(2, rank, dtype, stored, torch.device("cpu")), (rank, dtype, stored)


def it_compiles() -> None:
    """To machine code of three NVIDIA generations; the interpreter accepts more than the compiler.

    The launch's arguments: pointers, strides (those that are 1 as constants), block sizes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorasb_runtime.ops.core_triton import slot_matvec_kernel

    cases = [(75, "fp16", 1, 1, 1), (80, "bf16", 100, 16, 128), (90, "fp32", 64, 32, 64)]
    for capability, dtype, rank, block_i, block_j in cases:
        constants = {"rank": rank, "block_i": block_i, "block_j": block_j}
        constants |= {"h_column": 1, "core_column": 1}
        signature = dict.fromkeys(slot_matvec_kernel.arg_names, "i32")
        signature |= {"h": f"*{dtype}", "cores": "*bf16", "slots": "*i64", "out": f"*{dtype}"}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(slot_matvec_kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"], capability


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if sys.argv[1] == "compile":
        it_compiles()
    else:
        every_shape_and_dtype()
        strides_sizes_and_overflow()
        the_same_function_uses_it()
        it_checks_itself()

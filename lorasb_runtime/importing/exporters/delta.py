"""`delta`: what the adapter adds to each weight, as full tensors in the checkpoint's own layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.importing.exporters.export import Export
from lorasb_runtime.ops.core_matmul import dense_delta

BLOCK_ELEMENTS = 1 << 22  # that are in float64 at once


def write(export: Export, output: Path, force: bool) -> dict[str, Any]:
    """`<module>.weight` [out, in], or [in, out] where the checkpoint stores the weight so."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in export.basis.targets:
        shape = (target.out_features, target.in_features)
        shapes[f"{target.module}.weight"] = shape[::-1] if target.transposed else shape
    export.write_file(output, shapes, _tensors(export), force)
    return {"tensors": len(shapes)}


def _tensors(export: Export) -> Iterator[torch.Tensor]:
    for index, target in enumerate(export.basis.targets):
        b, a = export.basis.b(target.module).double(), export.basis.a(target.module).double()
        core = export.scaled_core(index)
        whole = torch.empty(target.out_features, target.in_features, dtype=export.dtype)
        step = max(1, BLOCK_ELEMENTS // target.in_features)
        for start in range(0, target.out_features, step):
            rows = slice(start, start + step)
            whole[rows] = export.rounded(dense_delta(b[rows], core, a), target.module)
        yield whole.t() if target.transposed else whole

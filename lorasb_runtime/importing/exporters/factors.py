"""`factors`: B, R and A of every module in one safetensors file, the scaling already in R."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.importing.exporters.export import Export


def write(export: Export, output: Path, force: bool) -> dict[str, Any]:
    """`<module>.A` [r, in], `<module>.B` [out, r], `<module>.R` [r, r]; delta = B @ R @ A."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in export.basis.targets:
        shapes[f"{target.module}.A"] = (target.rank, target.in_features)
        shapes[f"{target.module}.B"] = (target.out_features, target.rank)
        shapes[f"{target.module}.R"] = (target.rank, target.rank)
    export.write_file(output, shapes, _tensors(export), force)
    return {"tensors": len(shapes)}


def _tensors(export: Export) -> Iterator[torch.Tensor]:
    for index, target in enumerate(export.basis.targets):
        yield export.basis.a(target.module).double()
        yield export.basis.b(target.module).double()
        yield export.scaled_core(index)

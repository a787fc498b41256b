"""An adapter's checkpoint of another program: what it changes, and what stock PEFT makes of it."""

from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.importing.folder import CheckpointFolder
from lorasb_runtime.importing.foreign import Delta, Factors
from lorasb_runtime.importing.readers import latent, read_foreign
from lorasb_runtime.inspecting.adapter import OF_DELTA
from lorasb_runtime.inspecting.inspection import Inspection, ModuleRow
from lorasb_runtime.inspecting.weight_space import singular_values
from lorasb_runtime.ops.core_matmul import scale_core

STOCK_PEFT = (
    "warning: it holds a core R between A and B, which stock PEFT, and servers that read lora_A "
    "and lora_B, leave out without a word: they would apply B A, which is another adapter. "
    "`lorasb import` reads it, `lorasb export` folds R into B"
)


def inspect_checkpoint(path: Path) -> Inspection:
    """A LoRA-SB, LoRA-XS, PEFT or other adapter's folder, by the readers that `lorasb import` has.

    Raises what they raise.
    """
    found = read_foreign(CheckpointFolder(path))
    rows = tuple(_row(module, delta) for module, delta in found.modules.items())
    facts: dict[str, Any] = {
        "format": found.format,
        "bytes": sum(p.stat().st_size for p in path.glob("*.safetensors")),
        "targets": len(rows),
        "ranks": sorted({row.rank for row in rows}),
        "scaling": sorted({d.scaling for d in found.modules.values() if isinstance(d, Factors)}),
        "norm": sum(row.norm**2 for row in rows) ** 0.5,
        "frozen_basis": found.shared,
        "base_model": found.base_model,
        "made_from": found.info,
    }
    notes = (STOCK_PEFT,) if found.format == latent.NAME else ()
    return Inspection("checkpoint", str(path), facts, rows, OF_DELTA, notes=notes)


def _row(module: str, delta: Delta) -> ModuleRow:
    assert isinstance(delta, Factors)  # what all readers of folders give
    left, right = (torch.linalg.qr(x.double(), mode="r").R for x in (delta.b, delta.a.t()))
    core = torch.ones(delta.a.shape[0]) if delta.core is None else delta.core
    core = torch.diag(core) if core.dim() == 1 else core
    spectrum = singular_values(left @ scale_core(core.double(), delta.scaling) @ right.t())
    return ModuleRow(module, delta.out_features, delta.in_features, core.shape[0], spectrum)

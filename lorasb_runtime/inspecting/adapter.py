"""What one adapter holds; with its basis, how strong it is in each module."""

from pathlib import Path
from typing import Any

from lorasb_runtime.inspecting.basis import target_facts
from lorasb_runtime.inspecting.inspection import Inspection, ModuleRow
from lorasb_runtime.inspecting.weight_space import WeightSpace, singular_values
from lorasb_runtime.storage.adapter_file import load_adapter
from lorasb_runtime.storage.basis_file import map_basis

OF_DELTA = "singular values of the delta"


def inspect_adapter(path: Path, basis_path: Path | None) -> Inspection:
    """An adapter file's facts and, with its basis, a row for each target.

    Raises what `load_adapter` and `map_basis` raise.
    """
    basis = None if basis_path is None else map_basis(basis_path)
    adapter = load_adapter(path, basis)
    cores = adapter.cores.double()
    facts: dict[str, Any] = {
        "name": adapter.name,
        "version": adapter.version,
        "basis": adapter.basis,
        "bytes": path.stat().st_size,
        "numbers": cores.numel(),
        "dtype": str(adapter.cores.dtype).removeprefix("torch."),
        "core_norm": cores.norm().item(),
        "largest": cores.abs().max().item(),
        "base_model": adapter.base_model.as_json() if adapter.base_model else None,
        "made_from": adapter.info,
    }
    if basis is None:
        note = "its norms and ranks for each module take its basis: pass --basis"
        return Inspection("adapter", str(path), facts, notes=(note,))
    space = WeightSpace(basis)
    rows = tuple(
        ModuleRow.of(target, singular_values(space.core(adapter.cores, index)))
        for index, target in enumerate(basis.targets)
    )
    facts |= target_facts(basis.targets)
    facts["norm"] = sum(row.norm**2 for row in rows) ** 0.5
    return Inspection("adapter", str(path), facts, rows, OF_DELTA)

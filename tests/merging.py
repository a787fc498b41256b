"""Merging in tests: adapters into a folder, the tensors of a folder, and what they should be."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lorasb_runtime.merging import METHODS
from lorasb_runtime.merging.checkpoint import MergeConfig, MergeReport, merge_checkpoint
from lorasb_runtime.merging.delta import DeltaOf
from lorasb_runtime.merging.method_deltas import method_deltas
from lorasb_runtime.merging.provenance import describe_merge
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.models.locate import identify
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import open_checkpoint


def deltas_of(basis: Basis, *adapters: Adapter | WeightedAdapter) -> DeltaOf:
    items = [WeightedAdapter(a) if isinstance(a, Adapter) else a for a in adapters]
    return method_deltas(items, basis, METHODS["linear"])


def merge(
    model: Path,
    basis: Basis,
    output: Path,
    *adapters: Adapter | WeightedAdapter,
    force: bool = False,
    **options: Any,
) -> MergeReport:
    """Merge with a MergeConfig of these options."""
    items = [WeightedAdapter(a) if isinstance(a, Adapter) else a for a in adapters]
    source = open_checkpoint(model)
    return merge_checkpoint(
        source,
        basis,
        deltas_of(basis, *items),
        output,
        provenance=describe_merge(identify(str(model), source), basis, items, METHODS["linear"]),
        config=MergeConfig(**options),
        force=force,
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in open_checkpoint(folder).shards:
        found.update(safetensors.torch.load_file(folder / shard))
    return found


def exact_delta(basis: Basis, adapter: Adapter, index: int) -> torch.Tensor:
    """scaling * B @ R @ A in float64, [out, in]."""
    module = basis.targets[index].module
    core = basis.core(adapter.cores, index).double()
    return basis.scaling * (basis.b(module).double() @ core @ basis.a(module).double())


def is_rounded_sum(found: torch.Tensor, w0: torch.Tensor, delta: torch.Tensor) -> bool:
    """Whether `found` is w0 + delta rounded once; delta in float64.

    Sums that lie so near the middle of two numbers that float32's last bits decide may go to
    either.
    """
    exact = w0.double() + delta
    slack = 1e-7 * w0.double().abs() + 1e-6 * delta.abs().max()
    least, most = ((exact + sign * slack).to(found.dtype) for sign in (-1, 1))
    return bool(((least <= found) & (found <= most)).all())

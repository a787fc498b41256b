"""Whole models as full fine-tuning, Flora (arXiv 2402.03293) or a merge leaves them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from lorasb_runtime.basis.pair import BasisPair
from lorasb_runtime.basis.svd import truncated_svd
from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.folder import CheckpointFolder, TensorFile
from lorasb_runtime.importing.foreign import Delta, ForeignAdapter, Projection, Report
from lorasb_runtime.importing.model import Model
from lorasb_runtime.storage.checkpoint import Checkpoint, TensorEntry, open_checkpoint

NAME = "merged"
BLOCK_ELEMENTS = 1 << 22  # of a delta that are in float64 at once
BLOCK_BYTES = 8 << 20  # of a tensor that are compared at once


@dataclass(frozen=True)
class WeightDelta:
    """The difference of one weight in two checkpoints: dense, and read anew for each use."""

    out_features: int
    in_features: int
    read: Callable[[], torch.Tensor] = field(repr=False)  # [out, in] in float32

    def project(self, q_b: torch.Tensor, q_a: torch.Tensor) -> Projection:
        delta = self.read()
        core = torch.zeros(q_b.shape[1], q_a.shape[1], dtype=torch.float64)
        norm = residual = 0.0
        for rows in self._blocks():
            block = delta[rows].double()
            core += q_b[rows].t() @ (block @ q_a)
            norm += block.square().sum().item()
        for rows in self._blocks():
            outside = delta[rows].double() - q_b[rows] @ core @ q_a.t()
            residual += outside.square().sum().item()
        return Projection(core, math.sqrt(norm), math.sqrt(residual))

    def pair(self, rank: int | None) -> BasisPair:
        smaller = min(self.out_features, self.in_features)
        u, _, vt = truncated_svd(self.read(), smaller if rank is None else min(rank, smaller))
        return BasisPair(u, vt)

    def _blocks(self) -> Iterator[slice]:
        step = max(1, BLOCK_ELEMENTS // self.in_features)
        return (slice(i, i + step) for i in range(0, self.out_features, step))


def read_merged(folder: CheckpointFolder, model: Model, report: Report) -> ForeignAdapter:
    """What the model in `folder` has changed of MODEL's linear layers.

    info tells what else it changed, which no adapter can hold: `left_out` are the other tensors
    that differ, with the Frobenius norm of that, `added` those that MODEL has not. Raises
    InputError when no linear layer differs, FileFormatError when the two are not the same
    architecture.
    """
    found = open_checkpoint(folder.path)
    if any(c.config.get("quantization_config") for c in (found, model.checkpoint)):
        raise InputError(
            f"{folder.source}: found a quantized model, expected plain weights of both models"
        )
    changed = _changed(model.checkpoint, found, report)
    modules: dict[str, Delta] = {}
    for name, layer in model.layers.items():
        tensor = model.tensor_name(name)
        if layer.holder == name and tensor in changed:
            read = changed.pop(tensor)
            if layer.transposed:
                read = _transposed(read)
            modules[name] = WeightDelta(layer.out_features, layer.in_features, read)
    if not modules:
        raise InputError(
            f"{folder.source}: found the linear layers of {model.identity.name} unchanged, "
            "expected a model that was made from it"
        )
    return ForeignAdapter(
        folder.source,
        NAME,
        modules,
        base_model=model.identity.name,
        info={
            "left_out": {
                "tensors": sorted(changed),
                "norm": math.hypot(*(read().double().norm().item() for read in changed.values())),
            },
            "added": sorted(found.tensors.keys() - model.checkpoint.tensors.keys()),
        },
    )


def _changed(
    base: Checkpoint, found: Checkpoint, report: Report
) -> dict[str, Callable[[], torch.Tensor]]:
    """For each tensor of `base` that is another in `found`, what reads the difference."""
    before, after = _Weights(base), _Weights(found)
    changed = {}
    for done, (name, entry) in enumerate(base.tensors.items(), 1):
        other = found.tensors.get(name)
        if other is None or other.shape != entry.shape:
            shown = "no such tensor" if other is None else f"shape {list(other.shape)}"
            raise FileFormatError(
                str(found.folder), f"{shown} for {name}", f"{list(entry.shape)} as in {base.folder}"
            )
        difference = _difference(before, after, name)
        if entry.dtype == other.dtype:
            same = _same_bytes(base, entry, found, other)
        else:
            same = not difference().any()
        if not same:
            changed[name] = difference
        report("compare", done, len(base.tensors), name)
    return changed


class _Weights:
    """The tensors of a checkpoint folder, through memory maps."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._files = {shard: TensorFile(checkpoint.folder / shard) for shard in checkpoint.shards}

    def read(self, name: str) -> torch.Tensor:
        entry = self._tensors[name]
        return self._files[entry.file].tensor(name, len(entry.shape)).float()


def _difference(before: _Weights, after: _Weights, name: str) -> Callable[[], torch.Tensor]:
    return lambda: after.read(name) - before.read(name)


def _transposed(read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: read().t()


def _same_bytes(
    base: Checkpoint, entry: TensorEntry, found: Checkpoint, other: TensorEntry
) -> bool:
    paths = (base.folder / entry.file, found.folder / other.file)
    with paths[0].open("rb") as one, paths[1].open("rb") as two:
        one.seek(entry.offset)
        two.seek(other.offset)
        for start in range(0, entry.nbytes, BLOCK_BYTES):
            count = min(BLOCK_BYTES, entry.nbytes - start)
            if one.read(count) != two.read(count):
                return False
    return True

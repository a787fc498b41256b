"""What is written where: each output shard's tensors, and the pieces that they are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from lorasb_runtime.merging.view import ModelView
from lorasb_runtime.storage.checkpoint import TensorEntry, WeightPlace
from lorasb_runtime.storage.shard_writer import DTYPES, TensorSpec


@dataclass(frozen=True)
class Piece:
    """A tensor, or one matrix of a stack: folded (`target`), else converted or copied.

    `start`: where it begins in the output tensor, in bytes. `nbytes`, `dtype`: of the output.
    """

    name: str
    expert: int | None
    start: int
    nbytes: int
    dtype: str
    copied: bool
    target: int | None = None


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its tensors in order, and the pieces to make."""

    file: str
    layout: dict[str, TensorSpec]
    pieces: tuple[Piece, ...]


def plan_shards(
    view: ModelView, targets: Mapping[WeightPlace, int], dtypes: Mapping[str, torch.dtype]
) -> list[ShardPlan]:
    """The shards of the source, in its order of files and, unless dtypes change, of tensors.

    dtypes: of the tensors, by name, that do not keep their own.
    """
    by_name: dict[str, dict[int | None, int]] = {}
    for place, index in targets.items():
        by_name.setdefault(place.name, {})[place.expert] = index
    by_file: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in sorted(view.checkpoint.tensors.items(), key=lambda item: item[1].offset):
        by_file.setdefault(entry.file, {})[name] = entry
    plans = []
    for file in view.checkpoint.shards:
        entries = by_file.get(file, {})
        layout = {name: _spec(entry, dtypes.get(name)) for name, entry in entries.items()}
        if any(spec.dtype != entries[n].dtype for n, spec in layout.items()) or view.packed:
            # wide elements first, so that each stays aligned to its size
            layout = dict(sorted(layout.items(), key=lambda item: -_element_bytes(item[1])))
        pieces = [
            piece
            for name, spec in layout.items()
            for piece in _pieces(view, name, spec, by_name.get(name, {}))
        ]
        plans.append(ShardPlan(file, layout, tuple(pieces)))
    return plans


def output_dtypes(view: ModelView, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """`dtype` for every floating-point tensor; none where it is None."""
    if dtype is None:
        return {}
    return {n: dtype for n, entry in view.checkpoint.tensors.items() if entry.dtype in DTYPES}


def _spec(entry: TensorEntry, dtype: torch.dtype | None) -> TensorSpec:
    spec = TensorSpec(entry.dtype, entry.shape, entry.nbytes)
    return spec if dtype is None else spec.cast(dtype)


def _element_bytes(spec: TensorSpec) -> int:
    """8 for an empty tensor, which is aligned wherever it lies."""
    count = prod(spec.shape)
    return spec.nbytes // count if count else 8


def _pieces(
    view: ModelView, name: str, spec: TensorSpec, targets: dict[int | None, int]
) -> list[Piece]:
    packed = name in view.packed
    stacked = len(spec.shape) == 3 and (packed or any(e is not None for e in targets))
    copied = not packed and spec.dtype == view.checkpoint.tensors[name].dtype
    count = spec.shape[0] if stacked else 1
    nbytes = spec.nbytes // count if count else 0
    pieces = []
    for i in range(count):
        expert = i if stacked else None
        target = targets.get(expert)
        pieces.append(
            Piece(name, expert, i * nbytes, nbytes, spec.dtype, copied and target is None, target)
        )
    return pieces

"""One joint basis for a collection, solved module by module, and a core in it for each adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from lorasb_runtime.basis.joint_cores import JointModule, joint_module
from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.collection import Collection
from lorasb_runtime.importing.rebase import Fit
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import Report, TargetModule

Floats = np.ndarray[Any, np.dtype[np.float32]]


class CoreRows:
    """Cores as they come, module by module for all adapters, and read back adapter by adapter.

    They lie in `file` meanwhile, as all of them may be more than memory.
    """

    def __init__(self, file: BinaryIO, count: int) -> None:
        self._file = file
        self._count = count
        self._sizes: list[int] = []

    def add(self, cores: torch.Tensor) -> None:
        """One module's cores [count, r, r], float32."""
        self._sizes.append(cores[0].numel())
        self._file.write(cores.contiguous().numpy().data)

    def row(self, index: int) -> torch.Tensor:
        """The flat cores [D] of one adapter."""
        self._file.flush()
        data: Floats = np.memmap(self._file, dtype=np.float32, mode="r")
        parts, start = [], 0
        for size in self._sizes:
            begin = start + index * size
            parts.append(data[begin : begin + size])
            start += self._count * size
        return torch.from_numpy(np.concatenate(parts))


@dataclass(frozen=True)
class JointBasis:
    """fits: for each adapter by module, of what is stored.

    by_rank: the mean relative error if only the basis' first so many directions were kept.
    """

    basis: Basis
    fits: list[dict[str, Fit]]
    by_rank: dict[int, float]


def joint_basis(
    found: Collection,
    places: Sequence[int],
    rank: int,
    seed: int,
    rows: CoreRows,
    report: Report,
    info: dict[str, Any],
) -> JointBasis:
    """A basis of rank `rank` at most for the adapters at `places`; their cores go into `rows`.

    One module's factors are in memory at a time, beside the basis itself. A module that none of
    them changes is no target. Raises InputError where they change none at all.
    """
    curve = _Curve(rank, len(places))
    fits: list[dict[str, Fit]] = [{} for _ in places]
    targets, tensors, spectrum = [], {}, {}
    for done, (module, shape) in enumerate(found.shapes.items(), 1):
        stack = found.stack(module, places)
        solved = joint_module(stack, rank, seed) if stack.batches else None
        _note_fits(fits, found, places, module, solved)
        if solved is not None:
            width = solved.b.shape[1]
            targets.append(
                TargetModule(module, width, shape.in_features, shape.out_features, shape.transposed)
            )
            tensors[f"{module}.A"], tensors[f"{module}.B"] = solved.a, solved.b.contiguous()
            spectrum[module] = [float(f"{value:.4g}") for value in solved.spectrum.tolist()]
            rows.add(solved.cores)
            curve.add(solved)
        report("solve", done, len(found.shapes), module)
    if not targets:
        first = found.adapters[places[0]].source
        raise InputError(f"{first} and {len(places) - 1} more: found no delta but zeros")
    info = {**info, "rank": rank, "seed": seed, "loras": len(places), "spectrum": spectrum}
    basis = Basis(tuple(targets), tensors, "joint", 1.0, found.base_model, info)
    return JointBasis(basis, fits, curve.means())


def _note_fits(
    fits: list[dict[str, Fit]],
    found: Collection,
    places: Sequence[int],
    module: str,
    solved: JointModule | None,
) -> None:
    """solved: None where all deltas are zero."""
    for index, place in enumerate(places):
        if module in found.adapters[place].modules:
            norm = solved.norms[index].item() if solved else 0.0
            error = solved.errors[index].item() if solved else 0.0
            fits[index][module] = Fit(norm**2, error**2)


class _Curve:
    """What the adapters would lose with only the first directions of each module's basis."""

    def __init__(self, rank: int, count: int) -> None:
        ranks = [rank]
        while ranks[-1] > 1:
            ranks.append(ranks[-1] // 2)
        self._errors = {r: torch.zeros(count, dtype=torch.float64) for r in reversed(ranks)}
        self._norms = torch.zeros(count, dtype=torch.float64)

    def add(self, solved: JointModule) -> None:
        squares = solved.cores.double().square()
        whole = squares.sum(dim=(1, 2))
        self._norms += solved.norms.square()
        for rank, errors in self._errors.items():
            kept = squares[:, :rank, :rank].sum(dim=(1, 2))
            errors += solved.errors.square() + (whole - kept).clamp_min(0.0)

    def means(self) -> dict[int, float]:
        """By rank; an adapter of zeros loses nothing."""
        norms = torch.where(self._norms > 0, self._norms, 1.0)
        return {r: (e / norms).sqrt().mean().item() for r, e in self._errors.items()}

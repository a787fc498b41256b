"""One joint basis for a collection, solved module by module, and a core in it for each adapter."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from lorasb_runtime.basis.joint_cores import JointModule, joint_module
from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.collection import Collection, Shape
from lorasb_runtime.importing.rebase import Fit
from lorasb_runtime.ops.threads import one_thread
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import Report, TargetModule

MOST_WORKERS = 4  # modules that are solved, and held in memory, at once

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

    A few modules' factors are in memory at a time, beside the basis itself. A module that none of
    them changes is no target. Raises InputError where they change none at all.
    """
    curve = _Curve(rank, len(places))
    fits: list[dict[str, Fit]] = [{} for _ in places]
    made = _Tensors()
    with closing(_solve_all(found, places, rank, seed)) as modules:
        for done, (module, solved) in enumerate(modules, 1):
            _note_fits(fits, found, places, module, solved)
            if solved is not None:
                made.add(module, found.shapes[module], solved)
                rows.add(solved.cores)
                curve.add(solved)
            report("solve", done, len(found.shapes), module)
    if not made.targets:
        first = found.adapters[places[0]].source
        raise InputError(f"{first} and {len(places) - 1} more: found no delta but zeros")
    info = {**info, "rank": rank, "seed": seed, "loras": len(places), "spectrum": made.spectrum}
    basis = Basis(tuple(made.targets), made.tensors, "joint", 1.0, found.base_model, info)
    return JointBasis(basis, fits, curve.means())


class _Tensors:
    """A basis' parts, module after module."""

    def __init__(self) -> None:
        self.targets: list[TargetModule] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.spectrum: dict[str, list[float]] = {}  # rounded, as it is to be looked at

    def add(self, module: str, shape: Shape, solved: JointModule) -> None:
        sizes = (shape.in_features, shape.out_features)
        self.targets.append(TargetModule(module, solved.b.shape[1], *sizes, shape.transposed))
        self.tensors[f"{module}.A"] = solved.a
        self.tensors[f"{module}.B"] = solved.b.contiguous()
        self.spectrum[module] = [float(f"{value:.4g}") for value in solved.spectrum.tolist()]


def _solve_all(
    found: Collection, places: Sequence[int], rank: int, seed: int
) -> Generator[tuple[str, JointModule | None], None, None]:
    """Every module in its turn, None where all deltas are zero; several are solved at once.

    Each on one thread: its matrices are too small to be worth sharing.
    """

    def solve(module: str) -> JointModule | None:
        stack = found.stack(module, places)
        return joint_module(stack, rank, seed) if stack.batches else None

    workers = min(MOST_WORKERS, torch.get_num_threads())
    with one_thread(), ThreadPoolExecutor(workers, "lorasb-joint") as pool:
        futures = deque((module, pool.submit(solve, module)) for module in found.shapes)
        try:
            while futures:
                module, future = futures.popleft()
                yield module, future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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

"""Many adapters: a store, a pack or a folder of files, and how far they are from one another."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.pack_files import PackFiles
from lorasb_runtime.adapters.publishing import BASIS_FILE, adapter_files
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError
from lorasb_runtime.inspecting.distances import distance_matrix, gram_matrix
from lorasb_runtime.inspecting.inspection import AdapterRow, Inspection
from lorasb_runtime.inspecting.weight_space import WeightSpace
from lorasb_runtime.storage.adapter_file import (
    Adapter,
    check_basis,
    load_adapter,
    parse_adapter,
)
from lorasb_runtime.storage.basis_file import map_basis
from lorasb_runtime.types import Report

MEASURED = 500  # adapters at most whose distances are taken
MEMORY = 1 << 30  # bytes at most of their cores

Stored = tuple[Adapter, int]  # with its file's bytes


@dataclass(frozen=True)
class Collection:
    """Names, sorted, and how to read the adapter of one. facts: what is known without reading."""

    source: str
    names: Sequence[str]
    read: Callable[[str], Stored]
    facts: dict[str, Any]
    basis: Path | None = None


def open_store(url: str) -> Collection:
    """A store or a pack by its URL. Raises StoreError, FileFormatError."""
    store = AdapterStore(url)

    def read(name: str) -> Stored:
        data = store.fetch(parse_name(name), store.current(parse_name(name)))
        return parse_adapter(data, f"adapter {name!r}"), len(data)

    facts: dict[str, Any] = {"holds": "a store"}
    if isinstance(store.files, PackFiles):
        facts = {"holds": "a pack", "basis": store.files.basis, "bytes": Path(url).stat().st_size}
    return Collection(store.url, [str(name) for name in store.names()], read, facts)


def open_folder(folder: Path) -> Collection:
    """The adapter files of a folder, and the basis that lies beside them."""
    files = adapter_files(folder)
    beside = folder / BASIS_FILE

    def read(name: str) -> Stored:
        return load_adapter(files[name]), files[name].stat().st_size

    basis = beside if beside.is_file() else None
    return Collection(str(folder), list(files), read, {"holds": "a folder"}, basis)


def inspect_collection(
    found: Collection, basis_path: Path | None, report: Report = lambda *_: None
) -> Inspection:
    """Norms and distances of a collection's adapters, of an even selection where they are many.

    Damaged adapters, and those of another basis than `basis_path` or than most, are left out and
    noted. Raises InputError for an empty collection, BasisMismatchError where none fits the basis.
    """
    if not found.names:
        raise InputError(f"{found.source}: found no adapters, expected at least one")
    basis_path = basis_path or found.basis
    space = None if basis_path is None else WeightSpace(map_basis(basis_path))
    notes: list[str] = []
    read = _read_some(found, notes, report)
    fitting = _of_one_basis(read, space, found.source, notes)
    gram = gram_matrix([adapter.cores for adapter, _ in fitting.values()], space)
    facts = {
        **found.facts,
        "basis": next(iter(fitting.values()))[0].basis,
        "adapters_in_all": len(found.names),
        "measured": len(fitting),
    }
    return Inspection(
        "adapters",
        found.source,
        facts,
        adapters=_rows(fitting, gram),
        gram=gram,
        distance_of=_meaning(space),
        notes=tuple(notes),
    )


def _read_some(found: Collection, notes: list[str], report: Report) -> dict[str, Stored]:
    """An even selection of the adapters, as many as may be held at once."""
    names = list(found.names)
    read: dict[str, Stored] = {}
    done = 0
    while done < len(names):
        try:
            read[names[done]] = stored = found.read(names[done])
        except FileFormatError as error:
            notes.append(f"left out: {error}")
            stored = None
        if len(read) == 1 and stored is not None:
            most = max(1, min(MEASURED, MEMORY // stored[0].cores.nbytes))
            names = [*names[: done + 1], *_evenly(names[done + 1 :], most - 1)]
        done += 1
        report("read", done, len(names), "")
    if not read:
        raise InputError(f"{found.source}: found no adapter that can be read; {notes[0]}")
    if len(names) < len(found.names):
        notes.append(f"{len(names)} of {len(found.names):,} adapters are measured, evenly chosen")
    return read


def _evenly(names: Sequence[str], most: int) -> list[str]:
    if len(names) <= most:
        return list(names)
    return [names[(2 * i + 1) * len(names) // (2 * most)] for i in range(most)]


def _of_one_basis(
    read: dict[str, Stored], space: WeightSpace | None, source: str, notes: list[str]
) -> dict[str, Stored]:
    counts = Counter(adapter.basis for adapter, _ in read.values())
    wanted = space.basis.digest if space else counts.most_common(1)[0][0]
    fitting = {name: stored for name, stored in read.items() if stored[0].basis == wanted}
    if not fitting:
        other = counts.most_common(1)[0][0]
        raise BasisMismatchError(
            f"{source}: found adapters for {other}, expected some for {wanted}"
        )
    if len(fitting) < len(read):
        notes.append(f"left out, as they are for another basis: {len(read) - len(fitting)}")
    for name, (adapter, _) in fitting.items():
        if space is not None:
            check_basis(adapter, space.basis, f"adapter {name!r}")
    return fitting


def _rows(fitting: dict[str, Stored], gram: torch.Tensor) -> tuple[AdapterRow, ...]:
    names = list(fitting)
    apart = distance_matrix(gram).fill_diagonal_(math.inf)
    nearest = apart.argmin(dim=1).tolist()
    norms = gram.diagonal().sqrt().tolist()
    rows = []
    for index, (name, (adapter, nbytes)) in enumerate(fitting.items()):
        other = nearest[index]
        near = (names[other], apart[index, other].item()) if len(names) > 1 else (None, None)
        rows.append(AdapterRow(name, adapter.version, nbytes, norms[index], *near))
    return tuple(rows)


def _meaning(space: WeightSpace | None) -> str:
    if space is None:
        return "cores; those between merged weights take the basis: pass --basis"
    if space.orthonormal:
        return "merged weights: abs(scaling) times those between cores, as the basis is orthonormal"
    return "merged weights: by the QR factors of the basis, which is not orthonormal"

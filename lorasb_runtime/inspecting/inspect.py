"""Finds out what something is, and looks at it accordingly."""

from collections.abc import Callable
from pathlib import Path

from lorasb_runtime.adapters.publishing import BASIS_FILE, adapter_files
from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError
from lorasb_runtime.importing.folder import CheckpointFolder
from lorasb_runtime.importing.readers import IMPORTERS
from lorasb_runtime.inspecting.adapter import inspect_adapter
from lorasb_runtime.inspecting.basis import inspect_basis
from lorasb_runtime.inspecting.checkpoint import inspect_checkpoint
from lorasb_runtime.inspecting.collection import (
    inspect_collection,
    open_folder,
    open_store,
)
from lorasb_runtime.inspecting.inspection import Inspection
from lorasb_runtime.inspecting.model import inspect_model
from lorasb_runtime.storage import adapter_file, basis_file, pack_file, tensor_file
from lorasb_runtime.storage.checkpoint import INDEX, SINGLE
from lorasb_runtime.types import Report

KINDS = "a basis, an adapter, a pack, a store, a folder of adapters, a model or a checkpoint"


def inspect(source: str, basis: Path | None = None, report: Report = lambda *_: None) -> Inspection:
    """Look at a file, a folder or a store's URL.

    basis: of an adapter or of adapters. Raises NotFoundError, FileFormatError for what is none of
    KINDS, InputError for a basis where there is nothing to use it for, and what readers raise.
    """
    kind = kind_of(source)
    if kind in ("store", "pack"):
        return inspect_collection(open_store(source), basis, report)
    path = Path(source)
    if kind == "adapters":
        return inspect_collection(open_folder(path), basis, report)
    if kind == "adapter":
        return inspect_adapter(path, basis)
    if basis is not None:
        raise InputError(f"--basis: found it for a {kind}, expected an adapter or several")
    look: dict[str, Callable[[Path], Inspection]] = {
        "basis": inspect_basis,
        "checkpoint": inspect_checkpoint,
        "model": inspect_model,
    }
    return look[kind](path)


def kind_of(source: str) -> str:
    """basis, adapter, pack, store, adapters (a folder), checkpoint or model.

    Raises NotFoundError, FileFormatError.
    """
    path = Path(source)
    if "://" in source:
        return "store"
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.exists():
        raise NotFoundError(f"{source}: no such file or folder")
    header, _ = tensor_file.read_header(path)
    values = header.get("__metadata__")
    found = values.get("format") if isinstance(values, dict) else None
    kinds = {basis_file.FORMAT: "basis", adapter_file.FORMAT: "adapter", pack_file.FORMAT: "pack"}
    if found not in kinds:
        raise FileFormatError(source, f"a safetensors file of format {found!r:.40}", KINDS)
    return kinds[found]


def _kind_of_folder(path: Path) -> str:
    folder = CheckpointFolder(path)
    if folder.has("adapter_config.json") or any(i.recognises(folder) for i in IMPORTERS.values()):
        return "checkpoint"
    if (path / "config.json").is_file() or any((path / n).is_file() for n in (SINGLE, INDEX)):
        return "model"
    if adapter_files(path):
        return "adapters"
    if (path / BASIS_FILE).is_file():
        raise FileFormatError(str(path), f"nothing but {BASIS_FILE}", "adapters beside it")
    if any(path.glob("*/*/current")):
        return "store"
    inside = sorted(p.parent.name for p in path.glob(f"*/{BASIS_FILE}"))
    if inside:
        found = f"{len(inside)} folders with a basis each ({inside[0]}, ...)"
        raise FileFormatError(str(path), found, "one of them")
    raise FileFormatError(str(path), "a folder with nothing known in it", KINDS)

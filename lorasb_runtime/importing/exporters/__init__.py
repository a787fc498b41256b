"""Adapters for other programs. A new format is one new file and one entry in EXPORTERS."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.exporters import delta, factors, peft
from lorasb_runtime.importing.exporters.export import Export

# Writes a file or a folder whole or not at all; gives back what there is to say about it.
EXPORTERS: dict[str, Callable[[Export, Path, bool], dict[str, Any]]] = {
    "peft": peft.write,
    "factors": factors.write,
    "delta": delta.write,
}


def write_export(export: Export, kind: str, output: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the adapter to `output` in the format `kind`, whole or not at all.

    Raises InputError for an unknown format, a number that does not fit the dtype or a folder in
    the place of a file, ConflictError for an output that is in the way.
    """
    if kind not in EXPORTERS:
        raise InputError(f"format: found {kind!r}, expected one of {', '.join(EXPORTERS)}")
    return EXPORTERS[kind](export, output, force)


__all__ = ["EXPORTERS", "Export", "write_export"]

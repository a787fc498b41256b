"""Where imports and exports are written, and what an existing output may be replaced by."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.publishing import BASIS_FILE
from lorasb_runtime.errors import ConflictError, InputError
from lorasb_runtime.storage import atomic

# What training runs call every checkpoint; the folder above has the name that tells them apart.
NAMELESS = ("final_model", "ft")


@contextmanager
def output_folder(path: Path, holds: Sequence[str], *, force: bool) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well; checked as below."""
    check_output_folder(path, holds, force=force)
    with atomic.new_folder(path, force=force) as folder:
        yield folder


def check_output_folder(path: Path, holds: Sequence[str], *, force: bool) -> None:
    """Raise ConflictError where `path` exists with something in it.

    With `force` it may be a folder of nothing but files that match one of the patterns `holds`.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise ConflictError(f"{path}: already exists; choose another output or pass --force")
    if path.is_symlink() or not path.is_dir():
        raise ConflictError(f"{path}: found something other than a folder, expected one to replace")
    for entry in path.rglob("*"):
        if entry.is_dir() and not entry.is_symlink():
            continue
        if not entry.is_file() or not any(entry.match(pattern) for pattern in holds):
            raise ConflictError(
                f"{path}: found {entry.name} in it, expected nothing but {', '.join(holds)} in a "
                "folder to replace"
            )


def check_output_file(path: Path, *, force: bool) -> None:
    """Raise ConflictError where a file may not be written to `path`, InputError for a folder."""
    if path.is_dir():
        raise InputError(f"{path}: found a folder, expected the file to write")
    if path.exists() and not force:
        raise ConflictError(f"{path}: already exists; choose another output or pass --force")


def adapter_names(paths: Sequence[Path]) -> list[str]:
    """A name for the adapter of each checkpoint folder, in the letters that names may have.

    That is the folder's, or the one above for a training run's "final_model"; where several have
    the same, the folder above is put before it. Raises InputError where two remain the same.
    """
    plain = [_name(path) for path in paths]
    names = [
        name if plain.count(name) == 1 else f"{_letters(path.resolve().parent.name)}-{name}"
        for path, name in zip(paths, plain, strict=True)
    ]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1 or f"{name}.safetensors" == BASIS_FILE:
            raise InputError(
                f"{path}: found the name {name!r} for its adapter, which is another's too or the "
                "basis'; rename the folder"
            )
        parse_name(name)
    return names


def _name(path: Path) -> str:
    path = path.resolve()
    return _letters(path.parent.name if path.name in NAMELESS else path.name)


def _letters(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-64:].replace("..", "-")

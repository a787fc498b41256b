"""Write a file or a folder aside, then rename it: readers see the old one, the new one or none."""

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lorasb_runtime.errors import ConflictError


def write_bytes(path: Path, data: bytes, mode: int | None = None) -> None:
    """Replace `path` by `data` in one step that survives a crash (write aside, fsync, rename).

    mode: the file's permissions; by default what the umask leaves.
    """
    with new_file(path, mode) as file:
        file.write(data)


@contextmanager
def new_file(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` in one step when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a scratch folder beside `path` that becomes `path` when the block ends well.

    Raises ConflictError when `path` exists with something in it and `force` is false. With
    `force` the old folder is moved aside before the new one takes its name, and then deleted.
    What killed processes left behind for `path` is cleared away first.
    """
    _clear(path)
    if path.exists() and not force and (not path.is_dir() or any(path.iterdir())):
        raise ConflictError(f"{path}: already exists; choose another output or pass --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        aside = _new_scratch(path, locks)
        try:
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    sync_file(file)
            sync_folder(aside)
            _swap(aside, path)
        finally:
            _remove(aside)


def _new_scratch(path: Path, locks: ExitStack) -> Path:
    """A locked folder beside `path`; another one if someone took it for left behind before that."""
    while True:
        aside = _aside(path)
        aside.mkdir()
        locks.enter_context(_locked(aside, wait=True))
        if aside.exists():
            return aside


def _clear(path: Path) -> None:
    """Scratch folders that nobody writes any more go; an old folder comes back if it has to."""
    hidden = f".{glob.escape(path.name)}.*"
    for old in path.parent.glob(f"{hidden}.old"):
        aside = old.with_suffix(".tmp")
        with _locked(aside, wait=False) as ours:
            if ours or not aside.exists():
                _discard(old, path) if path.exists() else os.replace(old, path)
    for aside in path.parent.glob(f"{hidden}.tmp"):
        with _locked(aside, wait=False) as ours:
            if ours:
                _remove(aside)


def _discard(old: Path, path: Path) -> None:
    """Under a scratch name first: half of an old folder must never come back as `path`."""
    doomed = _aside(path)
    with suppress(FileNotFoundError):  # there was none, or another writer has it
        os.replace(old, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """A folder's configurations go first: without them nothing takes the rest for a model."""
    if path.is_dir() and not path.is_symlink():
        for config in path.glob("*config.json"):
            with suppress(OSError):
                config.unlink()
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the folder's lock, which ends with its process; false where another one holds it.

    False as well where the file system knows no locks, or the path is no folder (any more).
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(fd)


def _swap(aside: Path, path: Path) -> None:
    old = aside.with_suffix(".old")
    if path.exists():
        os.replace(path, old)
    os.replace(aside, path)
    sync_folder(path.parent)
    _discard(old, path)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _aside(path: Path) -> Path:
    """A name beside `path` that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")

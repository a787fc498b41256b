"""Adapter files on the local disk by version, checked by their digest whenever they are read.

Several processes may share one folder: files appear by rename, and all know them by content.
"""

import logging
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from lorasb_runtime.errors import InputError
from lorasb_runtime.storage.adapter_file import version_of

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
LEFTOVER_SECONDS = 3600.0  # after which a file that is still being written is a dead process's


class DiskCache:
    """Keeps its folder near `limit` bytes: the files used longest ago go first.

    The folder is looked through only after a twentieth of the limit has been written, so it may
    exceed the limit by that much for each process. A disk that fails costs a fetch, no request.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises InputError for a folder that cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"disk cache {folder}: {error.strerror}") from None
        self._folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._written = limit  # so that the first write looks at what is there already

    def get(self, version: str) -> bytes | None:
        """A version's file, None if it is not here; a damaged one is removed."""
        path = self._path(version)
        try:
            data = path.read_bytes()
            if version_of(data) != version:
                logger.warning("disk cache: %s is damaged and will be fetched again", path)
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("disk cache: %s", error)
            return None
        return data

    def put(self, version: str, data: bytes) -> None:
        """Keep a file; without fsync, since `get` finds out what a crash has left of it."""
        aside: str | None = None
        try:
            fd, aside = tempfile.mkstemp(dir=self._folder, prefix=f".{version[:9]}.", suffix=".tmp")
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.replace(aside, self._path(version))
        except OSError as error:
            logger.warning("disk cache: %s", error)
            if aside is not None:
                Path(aside).unlink(missing_ok=True)
            return
        with self._lock:
            self._written += len(data)
            if self._written * 20 < self._limit:
                return
            self._written = 0
            try:
                self._evict()
            except OSError as error:
                logger.warning("disk cache: %s", error)

    def _evict(self) -> None:
        """Remove the files used longest ago until the rest fits, and dead writers' leftovers."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process was faster
                    stat = entry.stat()
                    if entry.name.endswith(SUFFIX):
                        found.append((stat.st_mtime, stat.st_size, entry.path))
                    elif entry.name.endswith(".tmp") and _is_leftover(stat.st_mtime):
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    def _path(self, version: str) -> Path:
        return self._folder / f"{version}{SUFFIX}"


def _is_leftover(modified: float) -> bool:
    return time.time() - modified > LEFTOVER_SECONDS

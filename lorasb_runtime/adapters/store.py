"""The adapter store: a folder or bucket behind fsspec, with immutable versions and `current`.

<store>/<namespace>/<name>/<version>.safetensors and <store>/<namespace>/<name>/current
"""

import logging
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.errors import (
    FileFormatError,
    InputError,
    LorasbError,
    NotFoundError,
    StoreError,
    TooLargeError,
)
from lorasb_runtime.storage import atomic
from lorasb_runtime.storage.adapter_file import version_of

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
CURRENT = "current"
MAX_ADAPTER_BYTES = 256 * 1024 * 1024
_VERSION = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredVersion:
    """One version that lies in the store; `current` marks the one that is served."""

    name: AdapterName
    version: str
    nbytes: int
    modified: datetime | None
    current: bool


class AdapterStore:
    """Reads and publishes adapter files by name. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Raises InputError for a URL whose protocol fsspec does not know."""
        try:
            fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise InputError(f"store {url!r}: {error}") from None
        self.url = url
        self._fs: Any = fs
        self._root = root.rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)

    def current(self, name: AdapterName) -> str:
        """The version that is served now. Raises NotFoundError where the name is unknown."""
        path = f"{self._folder(name)}/{CURRENT}"
        text = self._read(path, f"adapter {str(name)!r}", 128).decode("ascii", "replace").strip()
        if not _VERSION.fullmatch(text):
            raise FileFormatError(path, repr(text[:80]), "a version of 64 hex digits")
        return text

    def fetch(self, name: AdapterName, version: str) -> bytes:
        """A version's bytes, checked against its digest. Raises NotFoundError, FileFormatError."""
        path = self._path(name, version)
        data = self._read(path, f"adapter {str(name)!r} version {version}", MAX_ADAPTER_BYTES)
        found = version_of(data)
        if found != version:
            raise FileFormatError(path, f"bytes with digest {found}", f"digest {version}")
        return data

    def publish(self, name: AdapterName, data: bytes) -> str:
        """Write the version, verify it, then make it current; returns the version."""
        version = version_of(data)
        self._write(self._path(name, version), data)
        self.fetch(name, version)
        self._write(f"{self._folder(name)}/{CURRENT}", version.encode())
        return version

    def rollback(self, name: AdapterName, version: str) -> None:
        """Make an earlier version current again. Raises NotFoundError where it is not there."""
        self.fetch(name, version)
        self._write(f"{self._folder(name)}/{CURRENT}", version.encode())

    def delete(self, name: AdapterName) -> None:
        """Remove an adapter with all its versions; `current` goes first."""
        folder = self._folder(name)
        try:
            if not self._fs.exists(f"{folder}/{CURRENT}"):
                raise NotFoundError(f"adapter {str(name)!r} not found in the store {self.url}")
            self._fs.rm_file(f"{folder}/{CURRENT}")
            self._fs.rm(folder, recursive=True)
        except FileNotFoundError:
            pass
        except LorasbError:
            raise
        except Exception as error:
            raise self._failure(folder, error) from error

    def names(self, namespace: str | None = None) -> list[AdapterName]:
        """Every adapter (of one namespace) that has a current version, sorted.

        Other files are passed over.
        """
        found = []
        for path in self._find(f"{self._root}/{namespace}" if namespace else self._root):
            parts = path.removeprefix(self._root).strip("/").split("/")
            if len(parts) == 3 and parts[-1] == CURRENT:
                try:
                    found.append(parse_name("/".join(parts[:2])))
                except InputError as error:
                    logger.warning("store %s: %s", self.url, error)
        return sorted(found)

    def versions(self, name: AdapterName) -> list[StoredVersion]:
        """All stored versions of an adapter, newest first. Raises NotFoundError if unknown."""
        current = self.current(name)
        found = []
        for path, info in self._find(self._folder(name)).items():
            version = path.rsplit("/", 1)[-1].removesuffix(SUFFIX)
            if _VERSION.fullmatch(version):
                modified = _modified(info)
                size = int(info["size"])
                found.append(StoredVersion(name, version, size, modified, version == current))
        return sorted(found, key=lambda v: (v.modified is not None, v.modified), reverse=True)

    def _folder(self, name: AdapterName) -> str:
        return f"{self._root}/{name.namespace}/{name.name}"

    def _path(self, name: AdapterName, version: str) -> str:
        if not _VERSION.fullmatch(version):
            raise InputError(f"version: found {version[:80]!r}, expected 64 hex digits")
        return f"{self._folder(name)}/{version}{SUFFIX}"

    def _read(self, path: str, what: str, limit: int) -> bytes:
        try:
            data = self._read_bytes(path, limit + 1)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFoundError(f"{what} not found in the store {self.url}") from None
        except Exception as error:
            raise self._failure(path, error) from error
        if len(data) > limit:
            raise TooLargeError(f"{path}: found more than {limit} bytes, expected at most that")
        return data

    def _write(self, path: str, data: bytes) -> None:
        try:
            if self._local:
                atomic.write_bytes(Path(path), data)
            else:
                self._fs.makedirs(os.path.dirname(path), exist_ok=True)
                self._fs.pipe_file(path, data)
        except LorasbError:
            raise
        except Exception as error:
            raise self._failure(path, error) from error

    def _read_bytes(self, path: str, limit: int) -> bytes:
        if isinstance(self._fs, MemoryFileSystem):  # whose open files share one read position
            whole: bytes = self._fs.cat_file(path)
            return whole
        with self._fs.open(path, "rb") as file:
            data: bytes = file.read(limit)
        return data

    def _find(self, folder: str) -> dict[str, dict[str, Any]]:
        try:
            found: dict[str, dict[str, Any]] = self._fs.find(folder, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise self._failure(folder, error) from error
        return found

    def _failure(self, path: str, error: Exception) -> StoreError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return StoreError(f"store {self.url}: {path}: {reason}")


def _modified(info: dict[str, Any]) -> datetime | None:
    value = info.get("mtime") or info.get("LastModified") or info.get("created")
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    return datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else None

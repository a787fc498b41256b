"""The adapter store: a folder or bucket behind fsspec, with immutable versions and `current`.

<store>/<namespace>/<name>/<version>.safetensors and <store>/<namespace>/<name>/current
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from lorasb_runtime.adapters.files import FileInfo, Files
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.adapters.pack_files import PackFiles, is_pack
from lorasb_runtime.adapters.retry import Retry
from lorasb_runtime.adapters.store_files import StoreFiles
from lorasb_runtime.errors import (
    ConflictError,
    DigestError,
    FileFormatError,
    InputError,
    NotFoundError,
)
from lorasb_runtime.storage.adapter_file import version_of

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
CURRENT = "current"
MAX_ADAPTER_BYTES = 256 * 1024 * 1024
MAX_CURRENT_BYTES = 128
DIGEST_ATTEMPTS = 3  # a read that was cut short looks like a wrong digest
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
    """Reads and publishes adapter files by name. Safe to use from several threads.

    Every call ends in the time that `retry` gives it, and repeats what failed for a moment.
    """

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        """A folder or bucket, or a pack file on this machine, which is only read.

        Raises InputError for a URL whose protocol fsspec does not know, FileFormatError for a
        file that is no pack.
        """
        retry = retry or Retry()
        self.files: Files = PackFiles(url, retry) if is_pack(url) else StoreFiles(url, retry)
        self.url = self.files.url

    def current(self, name: AdapterName) -> str:
        """The version that is served now. Raises NotFoundError where the name is unknown."""
        path = f"{self.folder(name)}/{CURRENT}"
        data = self.files.read(path, f"adapter {str(name)!r}", MAX_CURRENT_BYTES)
        text = data.decode("ascii", "replace").strip()
        if not _VERSION.fullmatch(text):
            raise FileFormatError(path, repr(text[:80]), "a version of 64 hex digits")
        return text

    def fetch(self, name: AdapterName, version: str, limit: int = MAX_ADAPTER_BYTES) -> bytes:
        """A version's bytes, checked against its digest.

        Raises NotFoundError, DigestError, and TooLargeError once `limit` bytes have been read.
        """
        return self._read(name, version, limit, lambda data: version_of(data) == version)

    def fetch_start(self, name: AdapterName, version: str, nbytes: int) -> bytes:
        """The first bytes of a version, unchecked."""
        what = f"adapter {str(name)!r} version {version}"
        return self.files.read_start(self.path(name, version), what, nbytes)

    def publish(self, name: AdapterName, data: bytes, version: str | None = None) -> str:
        """Write the version, verify it, then make it current; returns the version.

        version: that of `data`, where it has been computed already.
        """
        version = version or version_of(data)
        self.files.write(self.path(name, version), data)
        self._read(name, version, MAX_ADAPTER_BYTES, lambda found: found == data)
        self._make_current(name, version, data)
        return version

    def rollback(self, name: AdapterName, version: str) -> None:
        """Make an earlier version current again. Raises NotFoundError where it is not there."""
        self.files.need_writable()
        self._make_current(name, version, self.fetch(name, version))

    def delete(self, name: AdapterName) -> None:
        """Remove an adapter with all its versions; `current` goes first."""
        self.files.need_writable()
        current = f"{self.folder(name)}/{CURRENT}"
        if not self.files.exists(current):
            raise NotFoundError(f"adapter {str(name)!r} not found in the store {self.url}")
        self.files.remove(current)
        for path in self.files.find(self.folder(name)):
            self.files.remove(path)

    def remove_version(self, name: AdapterName, version: str) -> bool:
        """Remove a version unless it is the current one; returns whether it is gone.

        One that becomes current at this very moment is put back: whoever makes a version current
        looks afterwards whether it is still there, and so does this, so that whichever of the two
        comes last repairs it.
        """
        try:
            data = self.fetch(name, version)
        except FileFormatError:
            data = None  # damaged: nothing worth putting back
        if self._current_or_none(name) == version:
            return False
        self.files.remove(self.path(name, version))
        if data is not None and self._current_or_none(name) == version:
            self.files.write(self.path(name, version), data)
            return False
        return True

    def names(self, namespace: str | None = None) -> list[AdapterName]:
        """Every adapter (of one namespace) that has a current version, sorted.

        Other files are passed over.
        """
        return [name for name, files in self.listing(namespace).items() if CURRENT in files]

    def listing(self, namespace: str | None = None) -> dict[AdapterName, dict[str, FileInfo]]:
        """The files of every adapter's folder by their names, sorted by adapter; one listing."""
        found: dict[AdapterName, dict[str, FileInfo]] = {}
        folder = f"{self.files.root}/{namespace}" if namespace else self.files.root
        for path, info in self.files.find(folder).items():
            parts = path.removeprefix(self.files.root).strip("/").split("/")
            if len(parts) != 3:
                continue
            try:
                name = parse_name("/".join(parts[:2]))
            except InputError as error:
                logger.warning("store %s: %s", self.url, error)
                continue
            found.setdefault(name, {})[parts[2]] = info
        return dict(sorted(found.items()))

    def files_of(self, name: AdapterName) -> dict[str, FileInfo]:
        """The files of one adapter's folder by their names."""
        found = self.files.find(self.folder(name))
        return {path.rsplit("/", 1)[-1]: info for path, info in found.items()}

    def versions(self, name: AdapterName) -> list[StoredVersion]:
        """All stored versions of an adapter, newest first. Raises NotFoundError if unknown."""
        current = self.current(name)
        return versions_among(self.files_of(name), name, current)

    def folder(self, name: AdapterName) -> str:
        return f"{self.files.root}/{name.namespace}/{name.name}"

    def path(self, name: AdapterName, version: str) -> str:
        """Where a version lies. Raises InputError for a version that is none."""
        if not _VERSION.fullmatch(version):
            raise InputError(f"version: found {version[:80]!r}, expected 64 hex digits")
        return f"{self.folder(name)}/{version}{SUFFIX}"

    def _read(
        self, name: AdapterName, version: str, limit: int, is_whole: Callable[[bytes], bool]
    ) -> bytes:
        path = self.path(name, version)
        what = f"adapter {str(name)!r} version {version}"
        for attempt in range(DIGEST_ATTEMPTS):
            if attempt:
                self.files.retry.add()
            data = self.files.read(path, what, limit)
            if is_whole(data):
                return data
        raise DigestError(path, f"bytes with digest {version_of(data)}", f"digest {version}")

    def _make_current(self, name: AdapterName, version: str, data: bytes) -> None:
        self.files.write(f"{self.folder(name)}/{CURRENT}", version.encode())
        if not self.files.exists(self.path(name, version)):  # pruned in between
            self.files.write(self.path(name, version), data)

    def _current_or_none(self, name: AdapterName) -> str | None:
        try:
            return self.current(name)
        except NotFoundError:
            return None


def versions_among(
    files: dict[str, FileInfo], name: AdapterName, current: str | None
) -> list[StoredVersion]:
    """The versions among an adapter's files, newest first."""
    found = []
    for file, info in files.items():
        version = file.removesuffix(SUFFIX)
        if file.endswith(SUFFIX) and _VERSION.fullmatch(version):
            is_current = version == current
            found.append(StoredVersion(name, version, info.nbytes, info.modified, is_current))
    return sorted(found, key=lambda v: v.modified.timestamp() if v.modified else 0.0, reverse=True)


def previous_version(stored: list[StoredVersion], name: AdapterName) -> str:
    """Of versions sorted newest first, the one before the current. Raises ConflictError."""
    at = next((i for i, v in enumerate(stored) if v.current), len(stored))
    if at + 1 >= len(stored):
        raise ConflictError(f"adapter {str(name)!r}: found no version before the current one")
    return stored[at + 1].version


def version_starting(stored: list[StoredVersion], name: AdapterName, digits: str) -> str:
    """The one stored version that starts with `digits`. Raises NotFoundError, ConflictError."""
    found = [v.version for v in stored if v.version.startswith(digits)]
    what = f"adapter {str(name)!r}: found {{}} versions starting with {digits[:64]!r}, expected one"
    if not found:
        raise NotFoundError(what.format("no"))
    if len(found) > 1:
        raise ConflictError(what.format(len(found)))
    return found[0]

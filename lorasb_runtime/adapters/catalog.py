"""What a store holds, read from one listing, the `current` files and the adapters' headers."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from lorasb_runtime.adapters.files import FileInfo
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.store import CURRENT, AdapterStore, versions_among
from lorasb_runtime.errors import FileFormatError, NotFoundError

HEAD_BYTES = 4096  # holds the header of nearly every adapter
MAX_HEAD_BYTES = 1 << 20
READS = 32  # at once


@dataclass(frozen=True)
class CatalogEntry:
    """One adapter as it lies in the store; `problem` says in one line why it cannot be served.

    version, nbytes, basis (a digest) and modified are those of the current version, None where
    they cannot be read. versions: how many are stored, None where a store cannot be listed.
    """

    name: AdapterName
    version: str | None = None
    versions: int | None = None
    nbytes: int | None = None
    basis: str | None = None
    modified: datetime | None = None
    problem: str | None = None


def list_adapters(store: AdapterStore, namespace: str | None = None) -> list[CatalogEntry]:
    """Every adapter (of one namespace) with a `current` file, sorted.

    A damaged one has a problem and hides no other. Two small reads for each adapter, many at once.
    Raises StoreError when the store fails.
    """
    listing = {name: files for name, files in store.listing(namespace).items() if CURRENT in files}
    with ThreadPoolExecutor(READS) as pool:
        entries = list(pool.map(lambda item: _entry(store, *item), listing.items()))
    return [entry for entry in entries if entry is not None]


def describe(store: AdapterStore, name: AdapterName) -> CatalogEntry:
    """One adapter. Raises NotFoundError where it is unknown, FileFormatError where damaged."""
    version = store.current(name)
    if not store.files.listable:
        data = store.fetch(name, version)
        return CatalogEntry(name, version, None, len(data), _basis(store, name, version, len(data)))
    return _described(store, name, version, store.files_of(name))


def _entry(
    store: AdapterStore, name: AdapterName, files: dict[str, FileInfo]
) -> CatalogEntry | None:
    try:
        version = store.current(name)
        return _described(store, name, version, files)
    except NotFoundError:  # deleted since it was listed
        return None
    except FileFormatError as error:
        count = len(versions_among(files, name, None))
        return CatalogEntry(name, versions=count, problem=str(error))


def _described(
    store: AdapterStore, name: AdapterName, version: str, files: dict[str, FileInfo]
) -> CatalogEntry:
    stored = versions_among(files, name, version)
    current = next((v for v in stored if v.current), None)
    if current is None:  # `current` has moved on since the listing, or names what is not there
        files = store.files_of(name)
        version = store.current(name)
        stored = versions_among(files, name, version)
        current = next((v for v in stored if v.current), None)
    if current is None:
        found = f"version {version}, which is not in the store"
        raise FileFormatError(f"{store.folder(name)}/{CURRENT}", found, "a stored version")
    basis = _basis(store, name, version, current.nbytes)
    return CatalogEntry(name, version, len(stored), current.nbytes, basis, current.modified)


def _basis(store: AdapterStore, name: AdapterName, version: str, nbytes: int) -> str:
    """The basis that a version's header names, without its cores."""
    path = store.path(name, version)
    data = store.fetch_start(name, version, HEAD_BYTES)
    length = 8 + int.from_bytes(data[:8], "little")
    if length > min(nbytes, MAX_HEAD_BYTES):
        raise FileFormatError(path, f"{nbytes} bytes without a safetensors header", "an adapter")
    if length > len(data):
        data = store.fetch_start(name, version, length)
    try:
        header = json.loads(data[8:length])
        basis, end = header["__metadata__"]["basis"], header["cores"]["data_offsets"][1]
    except (ValueError, KeyError, TypeError, IndexError):
        raise FileFormatError(path, "a header that is no adapter's", "an adapter") from None
    if not isinstance(basis, str) or length + end != nbytes:
        raise FileFormatError(path, f"{nbytes} bytes", f"{length + end}, as its header says")
    return basis

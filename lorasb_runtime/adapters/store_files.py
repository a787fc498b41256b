"""Whole files of one folder or bucket behind fsspec: read, write, remove, find in bounded time.

Knows no adapters and no layout. Each call is repeated after transient failures.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lorasb_runtime.adapters.failures import is_missing, store_error
from lorasb_runtime.adapters.files import FileInfo, Files
from lorasb_runtime.adapters.readers import find_reader
from lorasb_runtime.adapters.retry import Retry
from lorasb_runtime.errors import (
    ConflictError,
    InputError,
    LorasbError,
    NotFoundError,
    StoreError,
)
from lorasb_runtime.storage import atomic

T = TypeVar("T")

READ_ONLY = ("http", "https", "hf")
UNLISTABLE = ("http", "https")


class StoreFiles(Files):
    """Files of one folder or bucket."""

    def __init__(self, url: str, retry: Retry) -> None:
        """Raises InputError for a URL whose protocol fsspec does not know."""
        self.url = re.sub(r"(?<=://)[^/@]*@", "", url)  # without a password, for messages
        if "::" in url:
            raise InputError(f"store {self.url!r}: found a chain of file systems, expected one")
        try:
            fs, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        except (ValueError, ImportError) as error:
            raise InputError(f"store {self.url!r}: {error}") from None
        self.root: str = root.rstrip("/")
        self.retry = retry
        self._fs: Any = fs
        self._local = isinstance(fs, LocalFileSystem)
        self._protocol: str = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        self.listable = self._protocol not in UNLISTABLE
        self._reader = find_reader(fs)
        if self._protocol == "s3":
            _leave_retries_to_us(fs)

    def read_start(self, path: str, what: str, nbytes: int) -> bytes:
        try:
            return self._try(path, lambda left: self._reader(self._fs, path, nbytes, left))
        except _Missing:
            raise NotFoundError(f"{what} not found in the store {self.url}") from None

    def write(self, path: str, data: bytes) -> None:
        self.need_writable()

        def put(left: float) -> None:
            if self._local:
                self._write_local(Path(path), data)
            else:
                if not self._fs.async_impl:  # buckets have no folders; s3fs would make the bucket
                    self._fs.makedirs(os.path.dirname(path), exist_ok=True)
                self._fs.pipe_file(path, data, **self._limit(left))

        self._try(path, put)

    def remove(self, path: str) -> None:
        self.need_writable()
        with suppress(_Missing):
            self._try(path, lambda left: self._fs.rm_file(path, **self._limit(left)))
        if self._local:
            with suppress(OSError):
                os.rmdir(os.path.dirname(path))

    def find(self, folder: str) -> dict[str, FileInfo]:
        if not self.listable:
            raise ConflictError(
                f"store {self.url}: found an {self._protocol} store, which cannot be listed; "
                "ask for its adapters by name"
            )

        def ask(left: float) -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._fs.find(
                folder, detail=True, **self._limit(left)
            )
            return found

        try:
            listed = self._try(folder, ask)
        except _Missing:
            return {}
        return {
            path: FileInfo(int(info["size"] or 0), _modified(info)) for path, info in listed.items()
        }

    def need_writable(self) -> None:
        if self._protocol in READ_ONLY:
            raise ConflictError(
                f"store {self.url}: found an {self._protocol} store, which is read only; expected "
                "a folder or a bucket to write to"
            )

    def _write_local(self, path: Path, data: bytes) -> None:
        try:
            atomic.write_bytes(path, data)
        except FileNotFoundError as error:  # somebody removed the folder, just made, as empty
            raise StoreError(f"store {self.url}: {path}: {error}", transient=True) from None

    def _try(self, path: str, work: Callable[[float], T]) -> T:
        def attempt(left: float) -> T:
            try:
                return work(left)
            except LorasbError:
                raise
            except Exception as error:
                if is_missing(error):
                    raise _Missing from None
                raise store_error(self.url, path, error) from error

        return self.retry.run(attempt)

    def _limit(self, seconds: float) -> dict[str, float]:
        """fsspec's own time limit, which its asynchronous file systems have."""
        return {"timeout": seconds} if self._fs.async_impl else {}


class _Missing(Exception):
    """Between `_try` and its callers: there is no such file."""


def _leave_retries_to_us(fs: Any) -> None:
    """s3fs and botocore would repeat a failing call some thirty times, without our time limit."""
    fs.retries = 1
    fs.config_kwargs = {"retries": {"total_max_attempts": 1}, **fs.config_kwargs}


def _modified(info: dict[str, Any]) -> datetime | None:
    """Under the name that the kind of file system has for it."""
    found = (info.get(key) for key in ("mtime", "LastModified", "last_modified", "created"))
    value = next((v for v in found if v is not None), None)
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    return datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else None

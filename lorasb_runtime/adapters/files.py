"""What an adapter store asks of its files, wherever they are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import datetime

from lorasb_runtime.adapters.retry import Retry
from lorasb_runtime.errors import NotFoundError, TooLargeError


@dataclass(frozen=True)
class FileInfo:
    """`modified` is None where the store does not tell."""

    nbytes: int
    modified: datetime | None


class Files(ABC):
    """Whole files by their full path under `root`. Safe to use from several threads."""

    url: str
    root: str
    retry: Retry
    listable: bool

    @abstractmethod
    def read_start(self, path: str, what: str, nbytes: int) -> bytes:
        """At most the first `nbytes` bytes, in one request; `what` names the file.

        Raises NotFoundError, StoreError.
        """

    @abstractmethod
    def find(self, folder: str) -> dict[str, FileInfo]:
        """Every file under a folder by its full path, leftovers of killed writers included."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Replace a file in one step: readers see the old one or the new one."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file, and its folder when that was the last one; a missing one is no error."""

    @abstractmethod
    def need_writable(self) -> None:
        """Raise ConflictError for files that are only read."""

    def read(self, path: str, what: str, limit: int) -> bytes:
        """All bytes of a file. Raises NotFoundError, TooLargeError, StoreError."""
        data = self.read_start(path, what, limit + 1)
        if len(data) > limit:
            raise TooLargeError(f"{path}: found more than {limit} bytes, expected at most that")
        return data

    def exists(self, path: str) -> bool:
        """Asked by reading, because a failure to answer must not look like a missing file."""
        try:
            self.read_start(path, path, 1)
        except NotFoundError:
            return False
        return True

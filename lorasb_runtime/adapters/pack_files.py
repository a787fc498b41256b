"""A pack as the files of a store that is only read: each adapter with its one version."""

from pathlib import Path

from lorasb_runtime.adapters.files import FileInfo, Files
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.retry import Retry
from lorasb_runtime.errors import ConflictError, NotFoundError
from lorasb_runtime.storage.pack_file import PackFile

CURRENT = "/current"  # as in the store's layout
SUFFIX = ".safetensors"


def is_pack(url: str) -> bool:
    """Whether a store's URL is a file on this machine: then it has to be a pack."""
    return "://" not in url and Path(url).is_file()


class PackFiles(Files):
    """A pack's adapters by the paths of a store's layout."""

    root = ""
    listable = True

    def __init__(self, url: str, retry: Retry) -> None:
        """Raises FileFormatError for a file that is no pack, InputError for a name in it."""
        self.url = url
        self.retry = retry
        self._pack = PackFile(Path(url))
        self._index: dict[str, int] = {}
        for index, text in enumerate(self._pack.names):
            name = parse_name(text)
            self._index[f"/{name.namespace}/{name.name}"] = index

    @property
    def basis(self) -> str:
        """Digest of the basis that all adapters in the pack are for."""
        return self._pack.basis

    def by_version(self) -> dict[str, int]:
        """Where each version lies."""
        return {version: index for index, version in enumerate(self._pack.versions)}

    def adapter_bytes(self, index: int) -> bytes:
        return self._pack.adapter_bytes(index)

    def read_start(self, path: str, what: str, nbytes: int) -> bytes:
        folder, _, file = path.rpartition("/")
        index = self._index.get(folder)
        if index is not None:
            version = self._pack.versions[index]
            if file == CURRENT[1:]:
                return version.encode()[:nbytes]
            if file == version + SUFFIX:
                return self._pack.adapter_bytes(index, nbytes)
        raise NotFoundError(f"{what} not found in the pack {self.url}")

    def find(self, folder: str) -> dict[str, FileInfo]:
        """The two files of each adapter under `folder`."""
        one = self._index.get(folder)
        found: dict[str, FileInfo] = {}
        for place, index in self._index.items() if one is None else [(folder, one)]:
            if place.startswith(f"{folder}/") or place == folder:
                version = self._pack.versions[index]
                found[place + CURRENT] = FileInfo(len(version), None)
                found[f"{place}/{version}{SUFFIX}"] = FileInfo(self._pack.file_bytes(index), None)
        return found

    def write(self, path: str, data: bytes) -> None:
        self.need_writable()

    def remove(self, path: str) -> None:
        self.need_writable()

    def need_writable(self) -> None:
        raise ConflictError(
            f"pack {self.url}: found a pack, which is read only; expected a folder or a bucket to "
            "write to"
        )

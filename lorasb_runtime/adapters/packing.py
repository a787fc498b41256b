"""From a store to a pack: the current version of many adapters in one file."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import ConflictError, InputError
from lorasb_runtime.storage.pack_file import PackFile, write_pack

READS = 16  # at once
AHEAD = 128  # adapters held in memory


def pack_store(
    store: AdapterStore,
    path: Path,
    names: Sequence[AdapterName] | None,
    report: Callable[[int, int], None],
    *,
    force: bool = False,
) -> PackFile:
    """Write the adapters' current versions (all by default) into a pack.

    Raises ConflictError where `path` exists and `force` is false, NotFoundError for an unknown
    name, and whatever is wrong with an adapter: a pack is whole or not there.
    """
    if path.exists() and not force:
        raise ConflictError(f"{path}: already exists; choose another output or pass --force")
    chosen = sorted(set(names) if names is not None else store.names(), key=str)
    if not chosen:
        raise InputError(f"pack: found no adapters in the store {store.url}, expected at least one")
    with ThreadPoolExecutor(READS) as pool:
        reader = _ReadAhead(store, chosen, pool)
        return write_pack(
            path, [str(n) for n in chosen], reader.read, lambda done: report(done, len(chosen))
        )


class _ReadAhead:
    """Gives adapter files by their place, read in parallel while they are asked for in order."""

    def __init__(
        self, store: AdapterStore, names: Sequence[AdapterName], pool: ThreadPoolExecutor
    ) -> None:
        self._store = store
        self._names = names
        self._pool = pool
        self._next = -1
        self._stream: Iterator[bytes] = iter(())

    def read(self, index: int) -> bytes:
        if index != self._next:  # the start, or a second pass
            self._stream = self._from(index)
        self._next = index + 1
        return next(self._stream)

    def _from(self, index: int) -> Iterator[bytes]:
        for start in range(index, len(self._names), AHEAD):
            yield from self._pool.map(self._fetch, self._names[start : start + AHEAD])

    def _fetch(self, name: AdapterName) -> bytes:
        return self._store.fetch(name, self._store.current(name))

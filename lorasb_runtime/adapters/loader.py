"""From an adapter's name to verified cores in host memory, each version fetched once.

Blocking and safe to call from many threads; the server calls it from worker threads.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import ConflictError
from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.storage.adapter_file import Adapter, parse_adapter
from lorasb_runtime.storage.basis_file import Basis

DEFAULT_CACHE_BYTES = 1 << 30
NAME_LOCKS = 256  # names share locks by hash, so that unknown names leave nothing behind


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter ready for a slot: `cores` [D] already scaled."""

    name: AdapterName
    version: str
    cores: torch.Tensor


class AdapterLoader:
    """Resolves names against one store and one basis.

    A change that another process makes in the store is seen after `refresh` seconds at the most;
    what goes through `publish` or `rollback` here is seen by the next `get`.
    """

    def __init__(
        self,
        store: AdapterStore,
        basis: Basis,
        *,
        refresh: float = 1.0,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.basis = basis
        self._refresh = refresh
        self._cache_bytes = cache_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._name_locks = [threading.Lock() for _ in range(NAME_LOCKS)]
        self._current: dict[AdapterName, tuple[str, float]] = {}
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._cached = 0

    def get(self, name: AdapterName) -> LoadedAdapter:
        """The adapter's current version.

        Raises NotFoundError for an unknown name, FileFormatError or BasisMismatchError for a file
        that is not an adapter of this basis, StoreError when the store does not answer.
        """
        with self._name_lock(name):
            return self._load(name, self._current_version(name))

    def file_cores(self, loaded: LoadedAdapter) -> torch.Tensor:
        """The cores [D] as they are in the version's file, not scaled, for exact sums of them.

        Raises as `get` does where they have to be read again: with a scaling other than 1.
        """
        if self.basis.scaling == 1.0:
            return loaded.cores
        source = f"adapter {str(loaded.name)!r} version {loaded.version}"
        return parse_adapter(self.store.fetch(loaded.name, loaded.version), source).cores

    def publish(self, name: AdapterName, data: bytes) -> LoadedAdapter:
        """Check an adapter file's bytes, store them and make them current."""
        adapter = parse_adapter(data, f"adapter {str(name)!r}", self.basis)
        with self._name_lock(name):
            version = self.store.publish(name, data)
            self._remember(name, version)
            return LoadedAdapter(name, version, self._keep(version, adapter))

    def rollback(self, name: AdapterName, version: str | None) -> LoadedAdapter:
        """Make `version` current; without one, the newest stored version before the current."""
        with self._name_lock(name):
            if version is None:
                version = self._previous(name)
            loaded = self._load(name, version)
            self.store.rollback(name, version)
            self._remember(name, version)
            return loaded

    def delete(self, name: AdapterName) -> None:
        """Remove the adapter from the store; requests that already have it are not touched."""
        with self._name_lock(name):
            self.store.delete(name)
            self._current.pop(name, None)

    def _previous(self, name: AdapterName) -> str:
        stored = self.store.versions(name)
        at = next((i for i, v in enumerate(stored) if v.current), len(stored))
        if at + 1 >= len(stored):
            raise ConflictError(f"adapter {str(name)!r}: found no version before the current one")
        return stored[at + 1].version

    def _current_version(self, name: AdapterName) -> str:
        known = self._current.get(name)
        if known is not None and self._clock() - known[1] < self._refresh:
            return known[0]
        version = self.store.current(name)
        self._remember(name, version)
        return version

    def _remember(self, name: AdapterName, version: str) -> None:
        self._current[name] = (version, self._clock())

    def _load(self, name: AdapterName, version: str) -> LoadedAdapter:
        with self._lock:
            cores = self._cache.get(version)
            if cores is not None:
                self._cache.move_to_end(version)
                return LoadedAdapter(name, version, cores)
        data = self.store.fetch(name, version)
        adapter = parse_adapter(data, f"adapter {str(name)!r} version {version}", self.basis)
        return LoadedAdapter(name, version, self._keep(version, adapter))

    def _keep(self, version: str, adapter: Adapter) -> torch.Tensor:
        cores = scale_core(adapter.cores, self.basis.scaling)
        with self._lock:
            if version not in self._cache:
                self._cache[version] = cores
                self._cached += cores.nbytes
            while self._cached > self._cache_bytes and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cached -= dropped.nbytes
        return cores

    def _name_lock(self, name: AdapterName) -> threading.Lock:
        return self._name_locks[hash(name) % NAME_LOCKS]

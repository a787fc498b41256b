"""The cores of adapter versions: from host memory, a pack, the local disk, or the store."""

import logging
import time

import torch

from lorasb_runtime.adapters.disk_cache import DiskCache
from lorasb_runtime.adapters.flights import Flights
from lorasb_runtime.adapters.loader_stats import LoaderCounters
from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.pack_files import PackFiles
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.storage.adapter_file import Adapter, max_file_bytes, parse_adapter, version_of
from lorasb_runtime.storage.basis_file import Basis

logger = logging.getLogger(__name__)


class VersionCores:
    """Checked cores [D] by version; a version is brought in by one thread at a time."""

    def __init__(
        self,
        store: AdapterStore,
        basis: Basis,
        memory: MemoryCache,
        disk: DiskCache | None,
        counters: LoaderCounters,
        pack: PackFiles | None = None,
    ) -> None:
        """Raises BasisMismatchError for a pack of another basis."""
        if pack is not None and pack.basis != basis.digest:
            raise BasisMismatchError(
                f"{pack.url}: found a pack for basis {pack.basis}, expected {basis.digest}"
            )
        self._pack = pack
        self._packed = pack.by_version() if pack is not None else {}
        self._store = store
        self._basis = basis
        self._memory = memory
        self._disk = disk
        self._counters = counters
        self._limit = max_file_bytes(basis)
        self._flights: Flights[tuple[str, AdapterName | None], torch.Tensor] = Flights()

    def in_memory(self, version: str) -> torch.Tensor | None:
        return self._memory.get(version)

    def get(self, name: AdapterName, version: str) -> torch.Tensor:
        """The version's cores, wherever they are.

        Raises NotFoundError, FileFormatError, BasisMismatchError, TooLargeError, StoreError.
        """
        led = False

        def bring() -> torch.Tensor:
            nonlocal led
            led = True
            return self._bring(name, version)

        try:
            return self._flights.run((version, None), bring)
        except InputError:
            if led:
                raise
        # The file of the other name, for which it was being fetched, is bad; ours need not be.
        return self._flights.run((version, name), lambda: self._bring(name, version))

    def cached(self, name: AdapterName, version: str) -> torch.Tensor | None:
        """The version's cores if they can be had without the store."""
        cores = self._memory.get(version)
        if cores is None:
            data = self._from_pack(version) or self._from_disk(version)
            cores = None if data is None else self._keep(name, version, data)
        return cores

    def check(self, name: AdapterName, data: bytes) -> Adapter:
        """An adapter file's bytes as an adapter of this basis."""
        return parse_adapter(data, f"adapter {str(name)!r}", self._basis)

    def keep(self, adapter: Adapter, data: bytes) -> torch.Tensor:
        """Take in a checked adapter that was just published."""
        if self._disk is not None:
            self._disk.put(adapter.version, data)
        return self._memory.put(adapter.version, adapter.cores)

    def _bring(self, name: AdapterName, version: str) -> torch.Tensor:
        """Where to look, the nearest first."""
        cores = self._memory.get(version)
        if cores is not None:
            self._counters.add("hits")
            return cores
        self._counters.add("misses")
        data = self._from_pack(version) or self._from_disk(version)
        if data is None:
            data = self._fetch(name, version)
        return self._keep(name, version, data)

    def _from_pack(self, version: str) -> bytes | None:
        """A version out of the pack; a damaged one is passed over, the store has it too."""
        index = self._packed.get(version)
        if self._pack is None or index is None:
            return None
        data = self._pack.adapter_bytes(index)
        if version_of(data) != version:
            logger.error("%s: version %s is damaged", self._pack.url, version)
            return None
        self._counters.add("pack_hits")
        return data

    def _from_disk(self, version: str) -> bytes | None:
        data = self._disk.get(version) if self._disk is not None else None
        if data is not None:
            self._counters.add("disk_hits")
        return data

    def _fetch(self, name: AdapterName, version: str) -> bytes:
        start = time.perf_counter()
        data = self._store.fetch(name, version, self._limit)
        self._counters.fetched(time.perf_counter() - start)
        self._counters.add("fetches")
        self._counters.add("bytes_fetched", len(data))
        if self._disk is not None:
            self._disk.put(version, data)
        return data

    def _keep(self, name: AdapterName, version: str, data: bytes) -> torch.Tensor:
        """`data` has been checked against its digest."""
        source = f"adapter {str(name)!r} version {version}"
        adapter = parse_adapter(data, source, self._basis, version)
        return self._memory.put(version, adapter.cores)

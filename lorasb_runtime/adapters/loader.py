"""From an adapter's name to verified cores in host memory, each version fetched once.

Safe to call from many threads, and from an event loop by `load`; the store is asked in threads
of the loader's own.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from lorasb_runtime.adapters.current_versions import CurrentVersions
from lorasb_runtime.adapters.disk_cache import DiskCache
from lorasb_runtime.adapters.flights import Flights
from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.loader_config import LoaderConfig
from lorasb_runtime.adapters.loader_stats import LoaderCounters, LoaderStats
from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.outage import Outage
from lorasb_runtime.adapters.pack_files import PackFiles
from lorasb_runtime.adapters.prefetch import prefetch
from lorasb_runtime.adapters.store import AdapterStore, previous_version
from lorasb_runtime.adapters.version_cores import VersionCores
from lorasb_runtime.adapters.workers import StoreWorkers
from lorasb_runtime.errors import LorasbError, NotFoundError, StoreError
from lorasb_runtime.storage.basis_file import Basis

NAME_LOCKS = 256  # names share locks by hash, so that unknown names leave nothing behind


class AdapterLoader:
    """Resolves names against one store and one basis.

    A change that another process makes in the store is seen after `refresh` seconds at the most;
    what goes through `publish` or `rollback` here is seen by the next `get`. While the store does
    not answer, what is known and cached is served for `stale` seconds more.
    """

    def __init__(
        self,
        store: AdapterStore,
        basis: Basis,
        config: LoaderConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pack: PackFiles | None = None,
    ) -> None:
        """What `pack` holds is read from there.

        Raises BasisMismatchError for a pack, given so or as the store, that is of another basis.
        """
        pack = pack or (store.files if isinstance(store.files, PackFiles) else None)
        self.store = store
        self.basis = basis
        self.config = config = config or LoaderConfig()
        self.workers = StoreWorkers(config.fetches, config.timeout)
        self._clock = clock
        self._name_locks = [threading.Lock() for _ in range(NAME_LOCKS)]
        self._counters = LoaderCounters()
        self._memory = MemoryCache(config.cache_bytes)
        disk = None
        if config.disk_cache is not None:
            disk = DiskCache(config.disk_cache, config.disk_cache_bytes)
        self._cores = VersionCores(store, basis, self._memory, disk, self._counters, pack)
        self._current = CurrentVersions(clock, config.refresh, config.stale, config.names)
        self._lookups: Flights[AdapterName, tuple[LoadedAdapter, bool]] = Flights()
        self._outage = Outage(store.url, clock)

    def get(self, name: AdapterName) -> LoadedAdapter:
        """The adapter's current version.

        Raises NotFoundError for an unknown name, FileFormatError or BasisMismatchError for a file
        that is not an adapter of this basis, StoreError when the store does not answer.
        """
        ready = self._ready(name)
        if ready is not None:
            return ready
        lookup = self._begin(name)
        try:
            return self._counted(*lookup.result(self._patience(name)))
        except TimeoutError:
            return self._late(name)

    async def load(self, name: AdapterName) -> LoadedAdapter:
        """As `get`, without a thread that waits."""
        ready = self._ready(name)
        if ready is not None:
            return ready
        lookup = asyncio.shield(asyncio.wrap_future(self._begin(name)))
        try:
            return self._counted(*await asyncio.wait_for(lookup, self._patience(name)))
        except TimeoutError:
            return self._late(name)

    def prefetch(self, names: Iterable[AdapterName]) -> "Future[int]":
        """Load adapters in the background, half of the fetches at most; gives how many it could."""
        return prefetch(list(names), self._begin, max(1, self.config.fetches // 2))

    def publish(self, name: AdapterName, data: bytes) -> LoadedAdapter:
        """Check an adapter file's bytes, store them and make them current."""
        adapter = self._cores.check(name, data)
        with self._change(name):
            version = self.store.publish(name, data, adapter.version)
            cores = self._cores.keep(adapter, data)
            return self._change_to(name, version, cores)

    def rollback(self, name: AdapterName, version: str | None) -> LoadedAdapter:
        """Make `version` current; without one, the newest stored version before the current."""
        with self._change(name):
            if version is None:
                version = previous_version(self.store.versions(name), name)
            cores = self._cores.get(name, version)
            self.store.rollback(name, version)
            return self._change_to(name, version, cores)

    def delete(self, name: AdapterName) -> None:
        """Remove the adapter from the store; requests that already have it are not touched."""
        with self._change(name):
            self.store.delete(name)
            self._memory.drop(self._current.change(name, None))

    def stats(self) -> LoaderStats:
        memory, retries = self._memory, self.store.files.retry.count
        return self._counters.stats(retries=retries, cached=len(memory), cached_bytes=memory.nbytes)

    def close(self) -> None:
        """Stop the loader's threads; what they are doing ends by itself."""
        self.workers.close()

    def _ready(self, name: AdapterName) -> LoadedAdapter | None:
        """The answer if the store need not be asked."""
        if self._current.is_unknown(name):
            self._counters.add("negative_hits")
            raise NotFoundError(f"adapter {str(name)!r} not found in the store {self.store.url}")
        known = self._current.fresh(name)
        if known is None:
            return None
        cores = self._cores.in_memory(known.version)
        if cores is None:
            return None
        self._counters.add("hits")
        return self._loaded(name, known.version, cores)

    def _begin(self, name: AdapterName) -> "Future[tuple[LoadedAdapter, bool]]":
        deadline = self._clock() + self.config.timeout
        return self._lookups.begin(name, lambda: self._look_up(name, deadline), self.workers.fetch)

    def _patience(self, name: AdapterName) -> float:
        """Seconds to wait for the store: less where there is something to serve instead."""
        known = self._current.usable(name)
        if known is None or self._cores.in_memory(known.version) is None:
            return self.config.timeout
        return 0.0 if known.late else min(self.config.patience, self.config.timeout)

    def _late(self, name: AdapterName) -> LoadedAdapter:
        """For one who has waited long enough; the look-up goes on in the background."""
        stale = self._stale(name, self._cores.in_memory, "it takes too long to answer")
        if stale is None:
            raise StoreError(
                f"adapter {str(name)!r}: the store {self.store.url} did not answer within "
                f"{self.config.timeout:g} s"
            )
        return self._counted(stale, True)

    def _loaded(self, name: AdapterName, version: str, cores: torch.Tensor) -> LoadedAdapter:
        if name in self.config.pins:
            self._memory.pin(name, version)
        return LoadedAdapter(name, version, cores)

    def _counted(self, adapter: LoadedAdapter, stale: bool) -> LoadedAdapter:
        self._counters.add("stale_served", stale)
        return adapter

    def _look_up(self, name: AdapterName, deadline: float) -> tuple[LoadedAdapter, bool]:
        """In a thread of the loader's own: ask the store, else serve what is on this machine.

        Gives the adapter, and whether it is one that the store did not confirm.
        """
        try:
            if self._clock() > deadline:
                raise StoreError(f"store {self.store.url}: too many others wait for it")
            loaded = self._ask(name)
        except StoreError as error:
            self._counters.add("failures")
            stale = self._stale(name, lambda v: self._cores.cached(name, v), str(error))
            if stale is None:
                raise
            return stale, True
        except LorasbError as error:
            self._counters.add("failures", not isinstance(error, NotFoundError))
            raise
        self._outage.end()
        return loaded, False

    def _stale(
        self, name: AdapterName, find: Callable[[str], torch.Tensor | None], reason: str
    ) -> LoadedAdapter | None:
        """The version last confirmed, if that is not too long ago and `find` has its cores."""
        self._current.mark_late(name)
        known = self._current.usable(name)
        cores = find(known.version) if known is not None else None
        if known is None or cores is None:
            return None
        self._outage.begin(reason)
        return self._loaded(name, known.version, cores)

    def _ask(self, name: AdapterName) -> LoadedAdapter:
        asked = self._current.ask(name)
        try:
            version = self.store.current(name)
            try:
                cores = self._cores.get(name, version)
            except NotFoundError:  # replaced and pruned, or deleted, since we read `current`
                missing, version = version, self.store.current(name)
                if version == missing:
                    raise StoreError(
                        f"adapter {str(name)!r}: its current version {version} is not in the "
                        f"store {self.store.url}"
                    ) from None
                cores = self._cores.get(name, version)
        except NotFoundError:
            self._memory.drop(self._current.learn(name, None, asked))
            raise
        before = self._current.usable(name)
        self._counters.add("swaps", before is not None and before.version != version)
        loaded = self._loaded(name, version, cores)
        self._memory.drop(self._current.learn(name, version, asked))
        return loaded

    def _change_to(self, name: AdapterName, version: str, cores: torch.Tensor) -> LoadedAdapter:
        loaded = self._loaded(name, version, cores)
        self._memory.drop(self._current.change(name, version))
        self._counters.add("swaps")
        return loaded

    @contextmanager
    def _change(self, name: AdapterName) -> Iterator[None]:
        """One change of a name at a time; look-ups that began before it teach us nothing."""
        with self._name_locks[hash(name) % NAME_LOCKS]:
            try:
                yield
            except BaseException:
                self._current.doubt(name)
                raise
            finally:
                self._lookups.forget(name)

"""Cores in host memory by adapter version, least recently used out first."""

import threading
from collections import OrderedDict

import torch

from lorasb_runtime.adapters.names import AdapterName


class MemoryCache:
    """Keeps to its limits, but for pins and the last cores put in. Safe for many threads."""

    def __init__(self, max_bytes: int, max_count: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._lock = threading.Lock()
        self._cores: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._nbytes = 0
        self._pins: dict[AdapterName, str] = {}

    def __len__(self) -> int:
        return len(self._cores)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def get(self, version: str) -> torch.Tensor | None:
        with self._lock:
            cores = self._cores.get(version)
            if cores is not None:
                self._cores.move_to_end(version)
            return cores

    def put(self, version: str, cores: torch.Tensor) -> torch.Tensor:
        """Keep a version's cores; returns the ones that are kept."""
        with self._lock:
            kept = self._cores.setdefault(version, cores)
            self._cores.move_to_end(version)
            if kept is cores:
                self._nbytes += cores.nbytes
            while self._is_over():
                stay = {version, *self._pins.values()}
                oldest = next((v for v in self._cores if v not in stay), None)
                if oldest is None:
                    break
                self._nbytes -= self._cores.pop(oldest).nbytes
            return kept

    def drop(self, version: str | None) -> None:
        """Do not keep a version any longer, unless it is pinned."""
        with self._lock:
            if version is not None and version not in self._pins.values():
                cores = self._cores.pop(version, None)
                self._nbytes -= cores.nbytes if cores is not None else 0

    def pin(self, name: AdapterName, version: str) -> None:
        """Keep this version of an adapter in place of the one that was pinned before."""
        with self._lock:
            self._pins[name] = version

    def _is_over(self) -> bool:
        over = self._max_count is not None and len(self._cores) > self._max_count
        return over or self._nbytes > self._max_bytes

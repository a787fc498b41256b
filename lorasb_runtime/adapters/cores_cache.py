"""A bounded cache of cores in host memory, keyed by version; each is made once."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

KEY_LOCKS = 64  # versions share locks by hash, so that versions of the past leave nothing behind


class CoresCache:
    """Safe to use from several threads. The least recently used cores go first."""

    def __init__(self, max_bytes: int, max_count: int) -> None:
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()
        self._key_locks = [threading.Lock() for _ in range(KEY_LOCKS)]

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._held)

    def get(self, version: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The cores of `version`, from `make` where they are not here.

        Callers that ask for one version at the same time wait for one `make`; what it raises goes
        to its own caller, and the next one tries again.
        """
        with self._key_locks[hash(version) % KEY_LOCKS]:
            with self._lock:
                found = self._held.get(version)
                if found is not None:
                    self._held.move_to_end(version)
                    return found
            made = make()
            with self._lock:
                self._keep(version, made)
            return made

    def _keep(self, version: str, cores: torch.Tensor) -> None:
        self._held[version] = cores
        self._nbytes += cores.nbytes
        while self._nbytes > self._max_bytes or len(self._held) > self._max_count:
            _, dropped = self._held.popitem(last=False)
            self._nbytes -= dropped.nbytes

"""Adapters that a request brings with it: blends of named ones, and inline files.

Blocking and safe to call from many threads; the server calls it from worker threads.
"""

import base64
import binascii
import math
from collections.abc import Callable, Sequence

import torch

from lorasb_runtime.adapters.flights import Flights
from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError
from lorasb_runtime.merging.blend import blend_version, exact_blend
from lorasb_runtime.merging.combine import check_range
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.ops.core_matmul import resident_cores
from lorasb_runtime.storage.adapter_file import (
    Adapter,
    max_file_bytes,
    parse_adapter,
    version_of,
)
from lorasb_runtime.storage.basis_file import Basis
from lorasb_server.errors import FieldError, InlineBasisError, InlineTooLargeError

INLINE = "adapter.inline"
BLEND_NAME = AdapterName("", "blend")  # no published adapter can have an empty namespace
INLINE_NAME = AdapterName("", "inline")


class Blender:
    """Makes them ready for a slot, each content once: `cache` holds cores by version."""

    def __init__(self, basis: Basis, dtype: torch.dtype, cache: MemoryCache) -> None:
        """dtype: of the engine's slots, whose range the cores must not leave."""
        self._basis = basis
        self._dtype = dtype
        self._cache = cache
        self._flights: Flights[str, torch.Tensor] = Flights()

    def blend(self, parts: Sequence[tuple[LoadedAdapter, float]]) -> LoadedAdapter | None:
        """The weighted sum; None, the base model, where nothing is left to add.

        Weights of one version add up, a weight of 0 adds nothing, and one adapter of weight 1 is
        that adapter. Raises FieldError when the sum leaves the slots' range.
        """
        weights: dict[str, float] = {}
        for version in {loaded.version for loaded, _ in parts}:
            weight = math.fsum(w for loaded, w in parts if loaded.version == version)
            if weight:
                weights[version] = weight
        if not weights:
            return None
        by_version = {loaded.version: loaded for loaded, _ in parts}
        if list(weights.values()) == [1.0]:
            return by_version[next(iter(weights))]
        used = [(by_version[version], weight) for version, weight in weights.items()]
        version = blend_version(weights)
        return LoadedAdapter(BLEND_NAME, version, self._once(version, lambda: self._sum(used)))

    def inline(self, text: str) -> LoadedAdapter:
        """The adapter whose file `text` is in base64; its version is that of the same file, put.

        Raises FieldError for what is no adapter file, InlineTooLargeError, InlineBasisError.
        """
        limit = max_file_bytes(self._basis)
        if len(text) > encoded_length(limit):
            raise InlineTooLargeError(
                f"{INLINE}: found {len(text)} characters, at most {encoded_length(limit)} fit"
            )
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FieldError(INLINE, f"{INLINE}: found no base64 ({error})") from None
        version = version_of(data)
        return LoadedAdapter(INLINE_NAME, version, self._once(version, lambda: self._parse(data)))

    def _once(self, version: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The version's cores; those who ask for it at the same time wait for one `make`."""
        cores = self._cache.get(version)
        if cores is None:
            cores = self._flights.run(version, lambda: self._cache.put(version, make()))
        return cores

    def _sum(self, parts: list[tuple[LoadedAdapter, float]]) -> torch.Tensor:
        items = [
            WeightedAdapter(
                Adapter(loaded.cores, self._basis.digest, str(loaded.name), version=loaded.version),
                weight,
            )
            for loaded, weight in parts
        ]
        return self._fitting("adapter", exact_blend(items), "; use smaller weights")

    def _parse(self, data: bytes) -> torch.Tensor:
        try:
            adapter = parse_adapter(data, INLINE, self._basis)
        except BasisMismatchError as error:
            raise InlineBasisError(str(error)) from None
        except FileFormatError as error:
            raise FieldError(INLINE, str(error)) from None
        return self._fitting(INLINE, adapter.cores)

    def _fitting(self, param: str, cores: torch.Tensor, advice: str = "") -> torch.Tensor:
        """`cores`, if they stay in range on their way into a slot."""
        try:
            check_range(resident_cores(cores, self._basis.scaling, self._dtype))
        except InputError as error:
            raise FieldError(param, f"{param}: {error}{advice}") from None
        return cores


def encoded_length(nbytes: int) -> int:
    """Characters that base64 makes of so many bytes."""
    return 4 * math.ceil(nbytes / 3)

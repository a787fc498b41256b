"""Adapters that a request brings with it: blends of named ones, and inline files.

Blocking and safe to call from many threads; the server calls it from worker threads.
"""

import base64
import binascii
import math
from collections.abc import Sequence

import torch

from lorasb_runtime.adapters.cores_cache import CoresCache
from lorasb_runtime.adapters.loader import AdapterLoader, LoadedAdapter
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError
from lorasb_runtime.merging.blend import blend_for_slot, blend_version
from lorasb_runtime.merging.combine import round_cores
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.ops.core_matmul import scale_core
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

    def __init__(self, loader: AdapterLoader, dtype: torch.dtype, cache: CoresCache) -> None:
        """dtype: of the engine's slots, to which cores are rounded once."""
        self._loader = loader
        self._dtype = dtype
        self._cache = cache

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
        cores = self._cache.get(version, lambda: self._sum(used))
        return LoadedAdapter(BLEND_NAME, version, cores)

    def inline(self, text: str) -> LoadedAdapter:
        """The adapter whose file `text` is in base64; its version is that of the same file, put.

        Raises FieldError for what is no adapter file, InlineTooLargeError, InlineBasisError.
        """
        basis = self._loader.basis
        limit = max_file_bytes(basis)
        if len(text) > encoded_length(limit):
            raise InlineTooLargeError(
                f"{INLINE}: found {len(text)} characters, at most {encoded_length(limit)} fit"
            )
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FieldError(INLINE, f"{INLINE}: found no base64 ({error})") from None
        version = version_of(data)
        cores = self._cache.get(version, lambda: self._parse(data, basis))
        return LoadedAdapter(INLINE_NAME, version, cores)

    def _sum(self, parts: list[tuple[LoadedAdapter, float]]) -> torch.Tensor:
        digest = self._loader.basis.digest
        items = []
        for loaded, weight in parts:
            cores = self._loader.file_cores(loaded)
            adapter = Adapter(cores, digest, str(loaded.name), version=loaded.version)
            items.append(WeightedAdapter(adapter, weight))
        try:
            return blend_for_slot(items, self._loader.basis.scaling, self._dtype)
        except InputError as error:
            raise FieldError("adapter", f"adapter: {error}; use smaller weights") from None

    def _parse(self, data: bytes, basis: Basis) -> torch.Tensor:
        try:
            adapter = parse_adapter(data, INLINE, basis)
        except BasisMismatchError as error:
            raise InlineBasisError(str(error)) from None
        except FileFormatError as error:
            raise FieldError(INLINE, str(error)) from None
        try:
            return round_cores(scale_core(adapter.cores, basis.scaling), self._dtype)
        except InputError as error:
            raise FieldError(INLINE, f"{INLINE}: {error}") from None


def encoded_length(nbytes: int) -> int:
    """Characters that base64 makes of so many bytes."""
    return 4 * math.ceil(nbytes / 3)

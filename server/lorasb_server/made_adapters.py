"""Adapters that a request brings itself: blends of stored ones, and files sent inline."""

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasb_runtime.adapters.loader import LoadedAdapter
from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.errors import FileFormatError, InputError, TooLargeError
from lorasb_runtime.merging.combine import combine_adapters
from lorasb_runtime.merging.linear import combine
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.storage.adapter_file import Adapter, parse_adapter, version_of
from lorasb_runtime.storage.basis_file import Basis
from lorasb_server.errors import FieldError

CACHE_BYTES = 256 << 20
HEADER_ALLOWANCE = 1 << 20  # bytes of an adapter file besides its numbers
MADE = AdapterName("default", "made")


@dataclass(frozen=True)
class Part:
    """One adapter of a blend and what it is multiplied by."""

    adapter: LoadedAdapter
    weight: float


class MadeAdapters:
    """Makes them once for each content, and keeps the last ones, CACHE_BYTES in all.

    Their version is a digest of what they are made of, so that equal ones share a slot.
    """

    def __init__(self, basis: Basis) -> None:
        self._basis = basis
        self._cache = MemoryCache(CACHE_BYTES)

    async def blend(self, parts: Sequence[Part]) -> LoadedAdapter:
        """The weighted sum, taken in float64 in digest order and rounded to float32 once.

        Raises FieldError where the sum is no finite number.
        """
        if len(parts) == 1 and parts[0].weight == 1.0:
            return parts[0].adapter
        version = blend_version(parts)
        cores = self._cache.get(version)
        if cores is None:
            cores = self._cache.put(version, await asyncio.to_thread(self._sum, parts))
        return LoadedAdapter(MADE, version, cores)

    async def inline(self, text: str) -> LoadedAdapter:
        """The adapter file that `text` is the base64 of.

        Raises FieldError for what is no adapter file, TooLargeError, and BasisMismatchError for
        one of another basis.
        """
        limit = 4 * self._basis.size + HEADER_ALLOWANCE
        if len(text) > 4 * (limit // 3 + 1):
            raise TooLargeError(
                f"adapter.inline: found {len(text)} characters, expected the base64 of at most "
                f"{limit} bytes"
            )
        return await asyncio.to_thread(self._parse, text)

    def _sum(self, parts: Sequence[Part]) -> torch.Tensor:
        weighted = [
            WeightedAdapter(
                Adapter(p.adapter.cores, self._basis.digest, version=p.adapter.version), p.weight
            )
            for p in parts
        ]
        try:
            return combine_adapters(weighted, self._basis, combine)
        except InputError as error:
            raise FieldError("adapter", f"adapter: {error}") from None

    def _parse(self, text: str) -> LoadedAdapter:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FieldError(
                "adapter.inline", f"adapter.inline: found no base64 ({error}), expected that"
            ) from None
        version = version_of(data)
        cores = self._cache.get(version)
        if cores is None:
            try:
                adapter = parse_adapter(data, "adapter.inline", self._basis)
            except FileFormatError as error:
                raise FieldError("adapter.inline", str(error)) from None
            cores = self._cache.put(version, scale_core(adapter.cores, self._basis.scaling))
        return LoadedAdapter(MADE, version, cores)


def blend_version(parts: Sequence[Part]) -> str:
    """A digest of the adapters' versions and their weights, whatever their order."""
    lines = sorted(f"{part.adapter.version} {part.weight.hex()}" for part in parts)
    return hashlib.sha256("\n".join(["lorasb-blend", *lines]).encode()).hexdigest()

"""The KV cache's tensors: per layer and size class one [rows, kv_heads, capacity, d] for K and V.

Follows `KVRegions`, which alone decides who owns what.
"""

from dataclasses import dataclass

import torch

from lorasb_runtime.engines.torch.kv_regions import KVRegions, Move


@dataclass(frozen=True)
class KVShape:
    """What one token takes: layers, KV heads per layer, width of a head."""

    layers: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


class KVCache:
    """Tensors indexed [size class][layer]; memory is taken as the classes get rows."""

    def __init__(
        self, shape: KVShape, regions: KVRegions, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape = shape
        self._regions = regions
        self._dtype = dtype
        self._device = device
        self.keys = [self._empty(0, c) for c in regions.capacities]
        self.values = [self._empty(0, c) for c in regions.capacities]
        self._rows = [0] * len(regions.capacities)

    def prepare(self, moves: list[Move]) -> None:
        """Bring the tensors to the regions' sizes, then copy what has to move, in order."""
        for size, rows in enumerate(self._regions.rows):
            if rows != self._rows[size]:
                self.keys[size] = self._resized(self.keys[size], rows, size)
                self.values[size] = self._resized(self.values[size], rows, size)
                self._rows[size] = rows
        for move in moves:
            for tensors in (self.keys, self.values):
                pairs = zip(tensors[move.source.size], tensors[move.target.size], strict=True)
                for source, target in pairs:
                    moved = source[move.source.row, :, : move.tokens]
                    target[move.target.row, :, : move.tokens] = moved

    def _resized(self, old: list[torch.Tensor], rows: int, size: int) -> list[torch.Tensor]:
        new = self._empty(rows, self._regions.capacities[size])
        kept = min(rows, self._rows[size])
        for source, target in zip(old, new, strict=True):
            target[:kept] = source[:kept]
        return new

    def _empty(self, rows: int, capacity: int) -> list[torch.Tensor]:
        shape = (rows, self._shape.kv_heads, capacity, self._shape.head_dim)
        return [
            torch.zeros(shape, dtype=self._dtype, device=self._device)
            for _ in range(self._shape.layers)
        ]

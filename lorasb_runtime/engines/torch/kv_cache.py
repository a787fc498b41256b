"""The KV cache's tensors: per layer and size class one [rows, kv_heads, capacity, d] for K and V.

Beside them, per layer, the prefix cache's blocks: [blocks, 2, kv_heads, block, d], K first.
Follows `KVRegions` and `PrefixCache`, which alone decide who owns what.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorasb_runtime.engines.torch.kv_regions import KVRegions
from lorasb_runtime.engines.torch.prefix_cache import BlockCopy
from lorasb_runtime.engines.torch.scheduler import Step


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
        self,
        shape: KVShape,
        regions: KVRegions,
        dtype: torch.dtype,
        device: torch.device,
        kept_blocks: tuple[int, int] = (0, 1),
    ) -> None:
        """kept_blocks: how many blocks the prefix cache has, and their length in tokens."""
        self._shape = shape
        self._regions = regions
        self.dtype = dtype
        self._device = device
        self.keys = [self._empty(0, c) for c in regions.capacities]
        self.values = [self._empty(0, c) for c in regions.capacities]
        self._rows = [0] * len(regions.capacities)
        self.layout = 0  # another number whenever tensors have been replaced
        count, self._block = kept_blocks
        kept = (count, 2, shape.kv_heads, self._block, shape.head_dim)
        self._kept = [torch.empty(kept, dtype=dtype, device=device) for _ in range(shape.layers)]

    def capacity(self, size: int) -> int:
        """Of a size class' regions, in tokens."""
        return self._regions.capacities[size]

    def prepare(self, step: Step) -> None:
        """Make the copies that come before a step, in the order that `Step` names.

        The tensors are brought to the regions' sizes after the saves, which still read old rows.
        """
        for save in step.saves:
            self._copy_blocks(save, self._save_block)
        for size, rows in enumerate(self._regions.rows):
            if rows != self._rows[size]:
                self.keys[size] = self._resized(self.keys[size], rows, size)
                self.values[size] = self._resized(self.values[size], rows, size)
                self._rows[size] = rows
                self.layout += 1
        for move in step.moves:
            for tensors in (self.keys, self.values):
                pairs = zip(tensors[move.source.size], tensors[move.target.size], strict=True)
                for source, target in pairs:
                    moved = source[move.source.row, :, : move.tokens]
                    target[move.target.row, :, : move.tokens] = moved
                    target[move.target.row, :, move.tokens :] = 0  # as of `Span`
        for restore in step.restores:
            self._copy_blocks(restore, self._restore_block)

    def _copy_blocks(
        self, copy: BlockCopy, one: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Hand `one` the kept blocks of each layer and half, their ids, and the region's place."""
        ids = torch.tensor(copy.ids, device=self._device)
        place = slice(copy.start, copy.start + len(copy.ids) * self._block)
        for half, tensors in enumerate((self.keys, self.values)):
            for kept, region in zip(self._kept, tensors[copy.region.size], strict=True):
                one(kept[:, half], ids, region[copy.region.row, :, place])

    def _save_block(self, kept: torch.Tensor, ids: torch.Tensor, place: torch.Tensor) -> None:
        kept[ids] = place.unflatten(1, (len(ids), self._block)).transpose(0, 1)

    def _restore_block(self, kept: torch.Tensor, ids: torch.Tensor, place: torch.Tensor) -> None:
        place.copy_(kept.index_select(0, ids).transpose(0, 1).flatten(1, 2))

    def _resized(self, old: list[torch.Tensor], rows: int, size: int) -> list[torch.Tensor]:
        new = self._empty(rows, self._regions.capacities[size])
        kept = min(rows, self._rows[size])
        for source, target in zip(old, new, strict=True):
            target[:kept] = source[:kept]
        return new

    def _empty(self, rows: int, capacity: int) -> list[torch.Tensor]:
        shape = (rows, self._shape.kv_heads, capacity, self._shape.head_dim)
        return [
            torch.zeros(shape, dtype=self.dtype, device=self._device)
            for _ in range(self._shape.layers)
        ]

"""How A and B are cut for tensor parallelism, as vLLM 0.32 cuts the weights beside them.

Pure tensor functions. Column-parallel layers (qkv, gate_up): A whole, B cut along its rows, each of
the fused outputs by itself; row-parallel ones (o, down): A cut along its columns, B whole, and the
layers' sum over the ranks adds up B R A x as it does W x. Cores are the same on every rank.
Read from vllm/lora/layers/{column,row}_parallel_linear.py and model_executor/layers/linear.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """`size` neighbouring rows of the whole matrix, cut into `shards` equal parts.

    This rank has part `shard`; ranks may share one (replicated key and value heads).
    """

    size: int
    shards: int
    shard: int

    @property
    def local(self) -> int:
        """Rows on this rank."""
        return self.size // self.shards


def column_segments(sizes: Sequence[int], tp_size: int, tp_rank: int) -> tuple[Segment, ...]:
    """For a (merged) column-parallel layer whose fused outputs have `sizes` rows in all."""
    return tuple(Segment(size, tp_size, tp_rank) for size in sizes)


def qkv_segments(
    heads: int, kv_heads: int, head_size: int, v_head_size: int, tp_size: int, tp_rank: int
) -> tuple[Segment, Segment, Segment]:
    """For a QKV layer; with more ranks than key heads each head is on several ranks."""
    replicas = max(1, tp_size // kv_heads)
    kv_shards, kv_shard = tp_size // replicas, tp_rank // replicas
    return (
        Segment(heads * head_size, tp_size, tp_rank),
        Segment(kv_heads * head_size, kv_shards, kv_shard),
        Segment(kv_heads * v_head_size, kv_shards, kv_shard),
    )


def shard_b(b: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """This rank's rows of B [sum of sizes, r]: [sum of locals, r]."""
    parts = b.split([segment.size for segment in segments])
    return torch.cat(
        [p[s.local * s.shard :][: s.local] for p, s in zip(parts, segments, strict=True)]
    )


def shard_a(a: torch.Tensor, tp_size: int, tp_rank: int) -> torch.Tensor:
    """This rank's columns of a row-parallel layer's A [r, in]: [r, in / tp_size]."""
    return a.chunk(tp_size, dim=1)[tp_rank]

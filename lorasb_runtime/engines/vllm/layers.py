"""vLLM's linear layers with the shared pair (B, A) beside them, one class for each kind of layer.

They take the places of vLLM's own LoRA layers, whose forward (bias, reduction over the ranks,
gathering) they inherit; only what is added to the product differs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.model_executor.custom_op import maybe_get_oot_by_class
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from lorasb_runtime.engines.vllm.placement import Group
from lorasb_runtime.engines.vllm.sharding import (
    Segment,
    column_segments,
    qkv_segments,
    shard_a,
    shard_b,
)
from lorasb_runtime.engines.vllm.shared_delta import SharedDelta
from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.storage.basis_file import Basis


class _Shared:
    """The part that the three classes have in common, in front of vLLM's class."""

    deltas: tuple[SharedDelta, ...]

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """output + B (R (A x)) of every group; [tokens, ...], or [1, tokens, ...] both."""
        shape = output.shape
        if output.dim() == 3:
            output, x = output.flatten(0, 1), x.flatten(0, 1)
        for delta in self.deltas:
            output = delta.add_to(output, x)
        return output.view(shape)


class SharedColumnLinear(_Shared, ColumnParallelLinearWithLoRA):
    """For column-parallel layers: plain ones, gate_up and qkv."""


class SharedRowLinear(_Shared, RowParallelLinearWithLoRA):
    """For row-parallel layers: o and down."""


class SharedReplicatedLinear(_Shared, ReplicatedLinearWithLoRA):
    """For layers that every rank has whole."""


KINDS = (
    (ColumnParallelLinear, SharedColumnLinear),
    (MergedColumnParallelLinear, SharedColumnLinear),
    (QKVParallelLinear, SharedColumnLinear),
    (RowParallelLinear, SharedRowLinear),
    (ReplicatedLinear, SharedReplicatedLinear),
)


def shared_layer(base: nn.Module, name: str, deltas: Sequence[SharedDelta]) -> nn.Module:
    """The layer that takes the place of vLLM's linear layer `base`.

    Raises BasisMismatchError for a kind of layer whose sharding is not known here.
    """
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise InputError("VLLM_LORA_ENABLE_DUAL_STREAM: not supported with lorasb's layers")
    for kind, shared in KINDS:
        if type(base) is maybe_get_oot_by_class(kind):
            layer: Any = shared(base)
            layer.deltas = tuple(deltas)
            placed: nn.Module = layer
            return placed
    known = ", ".join(kind.__name__ for kind, _ in KINDS)
    raise BasisMismatchError(f"{name}: found {type(base).__name__}, expected one of {known}")


def segments_of(base: Any) -> tuple[Segment, ...]:
    """How the rows of a layer's output are cut over the tensor-parallel ranks."""
    if isinstance(base, QKVParallelLinear):
        return qkv_segments(
            base.total_num_heads,
            base.total_num_kv_heads,
            base.head_size,
            base.v_head_size,
            base.tp_size,
            base.tp_rank,
        )
    if isinstance(base, MergedColumnParallelLinear):
        return column_segments(base.output_sizes, base.tp_size, base.tp_rank)
    if isinstance(base, ColumnParallelLinear):
        return column_segments([base.output_size], base.tp_size, base.tp_rank)
    return (Segment(base.output_size, 1, 0),)


def shared_pair(
    base: Any, members: int, group: Group, basis: Basis
) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """A, B and where the outputs begin, of a group on this rank, in float32.

    As `GroupDelta` takes them: A [m * r, in], and B [out_i, r] of each member. members: modules
    that are fused in the layer. Raises BasisMismatchError for other shapes than the layer's.
    """
    segments = segments_of(base)
    if members == 1:
        parts = [segments]
    elif members == len(segments):
        parts = [(segment,) for segment in segments]
    else:
        raise BasisMismatchError(
            f"{group.layer}: found {members} modules fused in {len(segments)} outputs, expected "
            "as many of both"
        )
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + sum(segment.local for segment in part))
    shrinks, expands = [], []
    for member, index in zip(group.members, group.targets, strict=True):
        target = basis.targets[index]
        out = sum(segment.size for segment in parts[member])
        if (target.out_features, target.in_features) != (out, base.input_size):
            raise BasisMismatchError(
                f"{target.module}: found {target.out_features} x {target.in_features}, expected "
                f"vLLM's {out} x {base.input_size}"
            )
        a = basis.a(target.module)
        if isinstance(base, RowParallelLinear):
            a = shard_a(a, base.tp_size, base.tp_rank)
        shrinks.append(a)
        expands.append(shard_b(basis.b(target.module), parts[member]))
    begins = [starts[member] for member in group.members]
    return torch.cat(shrinks), expands, begins

"""Linear layers in the CPU's own layout, those that read one input as one multiply."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_runtime.models.adapted_linear import ALL_ROWS
from lorasb_runtime.ops.core_matmul import SlotRows
from lorasb_runtime.ops.dense import PackedWeight, pack_weight
from lorasb_runtime.ops.group_delta import GroupDelta


class RowsOf(Protocol):
    """Which rows of the batch that is running take which core of a group of layers."""

    @property
    def rows(self) -> slice | None:
        """The rows that may have an adapter; None when all are the base model's."""

    @property
    def slot_rows(self) -> SlotRows:
        """Their slots."""

    def own(self) -> torch.Tensor | None:
        """The decoding rows' cores as `apply_cores` takes them."""


class PackedGroup:
    """Layers that read one input, their weights stacked: [sum of out, in], packed.

    The first member that is asked computes for all, the others take their part; one that is asked
    about another input than its neighbours is right too, at the price of the whole.
    """

    def __init__(self, layers: Sequence[nn.Linear], packed: PackedWeight) -> None:
        """packed: of the layers' weights one below the other."""
        self._sizes = [layer.out_features for layer in layers]
        self._parts = list(self._sizes)  # of what the packed weight gives
        self._packed = packed
        self._bias = _stacked_bias(layers)
        self._adapters: tuple[GroupDelta, RowsOf] | None = None
        self._x: torch.Tensor | None = None
        self._out: tuple[torch.Tensor, ...] = ()

    @property
    def adapted(self) -> bool:
        return self._adapters is not None

    def begin(self, member: int) -> int:
        """The first column of the member's output among all members'."""
        return sum(self._sizes[:member])

    @property
    def width(self) -> int:
        """Of all members' output."""
        return sum(self._sizes)

    def adapt(self, shrinks: Sequence[torch.Tensor], delta: GroupDelta, rows: RowsOf) -> None:
        """Add B R A x to members; A joins the weights, so that shrinking costs next to nothing.

        shrinks: A [r, in] of each member that has an adapter, in the order that `delta` takes; its
        A x stands behind the members' outputs.
        """
        weight = self._packed.unpack()
        packed = pack_weight(torch.cat([weight, *(a.to(weight.dtype) for a in shrinks)]))
        assert packed is not None and self._adapters is None
        self._packed = packed
        if self._bias is not None:
            added = sum(len(a) for a in shrinks)
            self._bias = torch.cat([self._bias, self._bias.new_zeros(added)])
        self._adapters = delta, rows
        self._parts.append(sum(len(a) for a in shrinks))

    def compute(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """Member's part for x: [..., in] -> [..., out], a view of all members' output."""
        if x is not self._x:
            y = self._packed.multiply(x, self._bias)
            if self._adapters is not None:
                self._add_adapters(y, *self._adapters)
            if len(self._sizes) == 1:
                return y if self._adapters is None else y[..., : self._sizes[0]]
            self._out = torch.split_with_sizes(y, self._parts, dim=-1)
            self._x = x
        out = self._out[member]
        if member + 1 == len(self._sizes):
            self._x, self._out = None, ()
        return out

    def _add_adapters(self, y: torch.Tensor, delta: GroupDelta, batch: RowsOf) -> None:
        rows = batch.rows
        if rows is None:
            return
        flat = y.view(-1, y.shape[-1])
        delta.add(flat if rows is ALL_ROWS else flat[rows], None, batch.slot_rows, batch.own)


class PackedLinear(nn.Linear):
    """A layer's seat in its group, which alone holds its weight.

    `weight` is an empty tensor on the meta device: it has the shape and the dtype, no values.
    """

    def __init__(self, base: nn.Linear, group: PackedGroup, member: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = nn.Parameter(torch.empty_like(base.weight, device="meta"), False)
        self.bias = base.bias
        self.group = group
        self.member = member

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.compute(x, self.member)


def pack_linears(model: PreTrainedModel, groups: Sequence[Sequence[str]]) -> None:
    """Put a PackedLinear in the place of each of these plain `nn.Linear`s where that is faster.

    groups: names of neighbours that read one input.
    """
    for names in groups:
        layers = [model.get_submodule(name) for name in names]
        linears = [layer for layer in layers if type(layer) is nn.Linear]
        assert len(linears) == len(layers)
        packed = pack_weight(torch.cat([layer.weight for layer in linears]))
        if packed is None:
            continue
        group = PackedGroup(linears, packed)
        for member, (name, layer) in enumerate(zip(names, linears, strict=True)):
            model.set_submodule(name, PackedLinear(layer, group, member))


def plain_linears(model: PreTrainedModel) -> list[str]:
    """Names of the model's plain `nn.Linear`s, in its own order."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _stacked_bias(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    """None where no layer has a bias; zeros for those that have none."""
    if all(layer.bias is None for layer in layers):
        return None
    biases: list[torch.Tensor] = []
    for layer in layers:
        none = layer.bias is None
        biases.append(layer.weight.new_zeros(layer.out_features) if none else layer.bias)
    return torch.cat(biases)

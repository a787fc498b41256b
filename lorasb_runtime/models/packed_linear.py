"""Linear layers in the CPU's own layout, those that read one input as one multiply."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_runtime.models.adapted_linear import ALL_ROWS
from lorasb_runtime.ops.core_matmul import SlotRows
from lorasb_runtime.ops.dense import AdaptedWeight, PackedWeight, pack_weight
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
    """Layers that read one input, their weights stacked: [width, in], packed.

    The first member that is asked computes for all, the others take their part; one that is asked
    about another input than its neighbours is right too, at the price of the whole.
    """

    def __init__(self, layers: Sequence[nn.Linear], packed: PackedWeight) -> None:
        """packed: of the layers' weights one below the other."""
        self._sizes = [layer.out_features for layer in layers]
        self._width = sum(self._sizes)
        self._packed = packed
        self._bias = _stacked_bias(layers)
        self._whole: AdaptedWeight | None = None
        self._adapters: tuple[GroupDelta, RowsOf] | None = None
        self._x: torch.Tensor | None = None
        self._out: tuple[torch.Tensor, ...] = ()

    @property
    def adapted(self) -> bool:
        return self._adapters is not None

    def _begin(self, member: int) -> int:
        """The first column of the member's output among all members'."""
        return sum(self._sizes[:member])

    def adapt(
        self,
        members: Sequence[int],
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        cores: torch.Tensor,
        rows: RowsOf,
    ) -> None:
        """Add B R A x to members; A joins the weights, so that shrinking costs next to nothing.

        pairs: A [r, in] and B [out, r] of each of them, whose A x stand behind the members'
        outputs. cores: [slots, m, r, r], a view of the slot table.
        """
        weight = self._packed.unpack()
        packed = pack_weight(torch.cat([weight, *(a.to(weight.dtype) for a, _ in pairs)]))
        assert packed is not None and not self.adapted
        self._packed = packed
        if self._bias is not None:
            shrunk = sum(len(a) for a, _ in pairs)
            self._bias = torch.cat([self._bias, self._bias.new_zeros(shrunk)])
        group = [b.to(weight.dtype) for _, b in pairs], [self._begin(m) for m in members], cores
        self._whole = packed.adapted(*group)
        self._adapters = GroupDelta(*group, decodes=self._whole is None), rows

    def compute(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """Member's part for x: [..., in] -> [..., out], a view of all members' output."""
        if x is not self._x:
            y = self._multiply(x)
            if len(self._sizes) == 1:
                return y
            self._out = torch.split_with_sizes(y, self._sizes, dim=-1)
            self._x = x
        out = self._out[member]
        if member + 1 == len(self._sizes):
            self._x, self._out = None, ()
        return out

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """All members' output: [..., in] -> [..., width]."""
        if self._adapters is None or self._adapters[1].rows is None:
            return self._packed.multiply(x, self._bias, self._width)
        delta, whose = self._adapters
        rows, batch = whose.rows, whose.slot_rows
        if self._whole is not None:
            y, h = self._whole.multiply(x, self._bias, batch.slots)
            if batch.decodes == batch.end:
                return y
            rows, batch = slice(batch.begin + batch.decodes, batch.end), batch.after_decodes()
        else:
            wide = self._packed.multiply(x, self._bias)
            y, h = wide[..., : self._width], wide[..., self._width :]
        parts = y.flatten(0, -2), h.flatten(0, -2)
        if rows is not ALL_ROWS:
            parts = parts[0][rows], parts[1][rows]
        delta.add(*parts, batch, whose.own)
        return y


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

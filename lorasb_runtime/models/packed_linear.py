"""Linear layers in the CPU's own layout, those that read one input as one multiply."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_runtime.models.adapted_linear import ALL_ROWS
from lorasb_runtime.ops.core_matmul import expand_add
from lorasb_runtime.ops.dense import pack_weight, packed_linear, unpack_weight

# Up to so many numbers one multiply by B's of all members, zeros between them included, is faster
# than one for each member.
LARGEST_BLOCK_B = 1 << 18


class CoreRowsOf(Protocol):
    """The cores of m layers that read one input, for the rows of the batch that is running."""

    @property
    def rows(self) -> slice | None:
        """The rows that may have an adapter; None when all are the base model's."""

    def multiply(self, h: torch.Tensor) -> torch.Tensor:
        """Each row's own cores: [rows, m * r] -> [rows, m * r]."""


class PackedGroup:
    """Layers that read one input, their weights stacked: [sum of out, in], packed.

    The first member that is asked computes for all, the others take their part; one that is asked
    about another input than its neighbours is right too, at the price of the whole.
    """

    def __init__(self, layers: Sequence[nn.Linear], packed: torch.Tensor) -> None:
        """packed: of the layers' weights one below the other."""
        self._sizes = [layer.out_features for layer in layers]
        self._width = sum(self._sizes)
        self._packed = packed
        self._bias = _stacked_bias(layers)
        self._cores: CoreRowsOf | None = None
        self._expands: list[tuple[slice, slice, torch.Tensor]] = []
        self._x: torch.Tensor | None = None
        self._out: tuple[torch.Tensor, ...] = ()

    @property
    def adapted(self) -> bool:
        return self._cores is not None

    def adapt(
        self, pairs: Sequence[tuple[int, torch.Tensor, torch.Tensor]], cores: CoreRowsOf
    ) -> None:
        """Add B R A x to members; A joins the weights, so that shrinking costs next to nothing.

        pairs: (member, A [r, in], B [out, r]) of those that have an adapter, in the cores' order
        and of one rank.
        """
        weight = unpack_weight(self._packed)
        shrinks = torch.cat([a for _, a, _ in pairs]).to(weight.dtype)
        packed = pack_weight(torch.cat([weight, shrinks]))
        assert packed is not None and self._cores is None
        self._packed = packed
        if self._bias is not None:
            self._bias = torch.cat([self._bias, self._bias.new_zeros(len(shrinks))])
        self._expands = self._expand_parts([(m, b.to(weight.dtype)) for m, _, b in pairs])
        self._cores = cores

    def compute(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """Member's part for x: [..., in] -> [..., out], a view of all members' output."""
        if x is not self._x:
            y = packed_linear(x, self._packed, self._bias)
            if self._cores is not None:
                self._add_adapters(y, self._cores)
                y = y[..., : self._width]
            if len(self._sizes) == 1:
                return y
            self._out = torch.split_with_sizes(y, self._sizes, dim=-1)
            self._x = x
        out = self._out[member]
        if member + 1 == len(self._sizes):
            self._x, self._out = None, ()
        return out

    def _add_adapters(self, y: torch.Tensor, cores: CoreRowsOf) -> None:
        rows = cores.rows
        if rows is None:
            return
        flat = y.view(-1, y.shape[-1])
        flat = flat if rows is ALL_ROWS else flat[rows]
        h = cores.multiply(flat[:, self._width :])
        for out, inner, b in self._expands:
            expand_add(flat[:, out], h[:, inner], b)

    def _expand_parts(
        self, pairs: Sequence[tuple[int, torch.Tensor]]
    ) -> list[tuple[slice, slice, torch.Tensor]]:
        """(columns of the output, of the cores' output, B) for each multiply by B's."""
        starts = [sum(self._sizes[:m]) for m, _ in pairs]
        rank = pairs[0][1].shape[1]
        parts = []
        for place, ((member, b), start) in enumerate(zip(pairs, starts, strict=True)):
            out = slice(start, start + self._sizes[member])
            parts.append((out, slice(place * rank, (place + 1) * rank), b))
        begin, end = starts[0], parts[-1][0].stop
        block = parts[0][2].new_zeros(end - begin, len(pairs) * rank)
        if len(parts) == 1 or block.numel() > LARGEST_BLOCK_B:
            return parts
        for out, inner, b in parts:
            block[out.start - begin : out.stop - begin, inner] = b
        return [(slice(begin, end), slice(0, block.shape[1]), block)]


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

"""A linear layer with the shared pair (B, A) beside it; where the core comes from is its seam."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_runtime.errors import BasisMismatchError
from lorasb_runtime.models.targets import is_linear, weight_of
from lorasb_runtime.ops.core_matmul import expand_add, scale_core, shrink
from lorasb_runtime.ops.dense import dense
from lorasb_runtime.storage.basis_file import Basis


class CoreSource(Protocol):
    """Multiplies rows by their cores: one trainable core, or a slot's core for each row."""

    @property
    def active(self) -> bool:
        """False when no row has an adapter, so that the layer is its base alone."""

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """R h for each row: [..., r] -> [..., r]."""


class AdaptedLinear(nn.Module):
    """y = W0 x + B (R (A x)), W0 x by the untouched base layer.

    a: [r, in], b: [out, r], in the base weight's dtype and on its device.
    """

    a: torch.Tensor
    b: torch.Tensor

    def __init__(self, base: nn.Module, a: torch.Tensor, b: torch.Tensor, core: CoreSource) -> None:
        super().__init__()
        self.base = base
        weight = weight_of(base)
        self.register_buffer("a", a.to(weight), persistent=False)
        self.register_buffer("b", b.to(weight), persistent=False)
        self.core = core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if not self.core.active:
            return y
        return expand_add(y, self.core(shrink(x, self.a)), self.b)


class DenseLinear(nn.Linear):
    """A linear layer that multiplies through `ops.dense`; shares the weight it is made of."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dense(x, self.weight, self.bias)


def use_dense(model: PreTrainedModel) -> None:
    """Put a DenseLinear in the place of every plain `nn.Linear`."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, DenseLinear(module))


class TrainableCore(nn.Module):
    """One float32 core that every row shares, as training needs it."""

    active = True

    def __init__(self, initial: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.core = nn.Parameter(initial.float().clone())
        self.scaling = scaling

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h @ scale_core(self.core, self.scaling).to(h.dtype).t()


def adapt_model(
    model: PreTrainedModel, basis: Basis, make_core: Callable[[int], CoreSource]
) -> None:
    """Put an AdaptedLinear in the place of every target; `make_core(i)` serves target i.

    Raises BasisMismatchError when a target is missing, is no linear layer or has another shape.
    """
    modules = dict(model.named_modules())
    for index, target in enumerate(basis.targets):
        module = modules.get(target.module)
        if module is None or not is_linear(module):
            found = "no such module" if module is None else type(module).__name__
            raise BasisMismatchError(f"{target.module}: found {found}, expected a linear layer")
        shape = tuple(weight_of(module).shape)
        if shape != (target.out_features, target.in_features):
            raise BasisMismatchError(
                f"{target.module}: found a weight of {list(shape)}, "
                f"expected [{target.out_features}, {target.in_features}]"
            )
        adapted = AdaptedLinear(
            module, basis.a(target.module), basis.b(target.module), make_core(index)
        )
        model.set_submodule(target.module, adapted)

"""A linear layer with the shared pair (B, A) beside it; where the core comes from is its seam."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_runtime.errors import BasisMismatchError
from lorasb_runtime.models.targets import is_linear, weight_of
from lorasb_runtime.ops.core_matmul import expand_add, scale_core, shrink
from lorasb_runtime.storage.basis_file import Basis

ALL_ROWS = slice(None)


class CoreSource(Protocol):
    """Computes R A x: with one trainable core, or with a slot's core for each row."""

    @property
    def rows(self) -> slice | None:
        """The rows that may have an adapter; None when the layer is its base alone."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """R A x for these rows of x, counted over all leading dimensions: [..., in] -> [n, r]."""


class AdaptedLinear(nn.Module):
    """y = W0 x + B (R (A x)), W0 x by the untouched base layer. b: [out, r]."""

    b: torch.Tensor

    def __init__(self, base: nn.Module, b: torch.Tensor, core: CoreSource) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("b", b, persistent=False)
        self.core = core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        rows = self.core.rows
        if rows is not None:
            flat = y.view(-1, y.shape[-1])
            expand_add(flat if rows == ALL_ROWS else flat[rows], self.core(x), self.b)
        return y


class TrainableCore(nn.Module):
    """One float32 core that every row shares, as training needs it. a: [r, in]."""

    a: torch.Tensor
    rows = ALL_ROWS

    def __init__(self, a: torch.Tensor, initial: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.core = nn.Parameter(initial.float().clone())
        self.scaling = scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = shrink(x.reshape(-1, x.shape[-1]), self.a)
        return h @ scale_core(self.core, self.scaling).to(h.dtype).t()


def adapt_model(
    model: PreTrainedModel, basis: Basis, make_core: Callable[[int], CoreSource]
) -> None:
    """Put an AdaptedLinear in the place of every target; `make_core(i)` serves target i.

    Raises BasisMismatchError as `check_targets` does.
    """
    check_targets(model, basis)
    for index, target in enumerate(basis.targets):
        adapt_layer(model, basis, target.module, make_core(index))


def adapt_layer(model: PreTrainedModel, basis: Basis, name: str, core: CoreSource) -> None:
    """Put an AdaptedLinear in the place of one target."""
    module = model.get_submodule(name)
    b = basis.b(name).to(model.device, weight_of(module).dtype)
    model.set_submodule(name, AdaptedLinear(module, b, core))


def check_targets(model: PreTrainedModel, basis: Basis) -> None:
    """Raises BasisMismatchError when a target is missing, no linear layer or of another shape."""
    modules = dict(model.named_modules())
    for target in basis.targets:
        module = modules.get(target.module)
        if module is None or not is_linear(module):
            found = "no such module" if module is None else type(module).__name__
            raise BasisMismatchError(f"{target.module}: found {found}, expected a linear layer")
        weight = weight_of(module)
        if tuple(weight.shape) != (target.out_features, target.in_features):
            raise BasisMismatchError(
                f"{target.module}: found a weight of {list(weight.shape)}, "
                f"expected [{target.out_features}, {target.in_features}]"
            )

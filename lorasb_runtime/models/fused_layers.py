"""Norms and gated MLPs with a CPU kernel for what torch takes many operations for.

A module is replaced only where it has been seen to compute the same, whatever its class is called.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorasb_runtime.models.shared_inputs import Call
from lorasb_runtime.ops.rows_cpu import RowKernels

# Of the whole, relative; the kernels round once, transformers' modules after each operation. In
# bfloat16 Gemma's GELU in the place of SiLU is off by 17.
ALLOWED_EPS = 4
PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


class FusedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension; scale: float32 [n]."""

    scale: torch.Tensor

    def __init__(
        self, weight: nn.Parameter, scale: torch.Tensor, eps: float, kernels: RowKernels
    ) -> None:
        """weight: kept for those who ask for its shape or dtype."""
        super().__init__()
        self.weight = weight
        self.register_buffer("scale", scale, persistent=False)
        self.eps = eps
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, self.scale, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), its layers under the names that they had."""

    def __init__(self, base: Any, kernels: RowKernels) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = base.gate_proj, base.up_proj
        self.down_proj = base.down_proj
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self._kernels.silu_mul(self.gate_proj(x), self.up_proj(x))
        y: torch.Tensor = self.down_proj(hidden)
        return y


def fusible_layers(model: nn.Module) -> list[str]:
    """Names of the modules that a fused one might take the place of."""
    return [name for name, m in model.named_modules() if _is_norm(m) or _is_gated(m)]


def fuse_layers(
    model: nn.Module, names: Sequence[str], calls: Mapping[str, Call], kernels: RowKernels
) -> None:
    """Replace those of these modules whose replacement computes the same.

    calls: what the modules were given; without it they stay.
    """
    for name in names:
        if name not in calls:
            continue
        module = model.get_submodule(name)
        for fused in _replacements(module, kernels):
            if _same(module, fused, calls[name]):
                model.set_submodule(name, fused)
                break


def _is_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    return list(parameters) == ["weight"] and parameters["weight"].dim() == 1


def _is_gated(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    own = list(module.named_parameters(recurse=False))
    return not own and PROJECTIONS <= children <= PROJECTIONS | {"act_fn"}


def _replacements(module: Any, kernels: RowKernels) -> list[nn.Module]:
    if _is_gated(module):
        return [GatedMLP(module, kernels)]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return []
    scale = module.weight.detach().float()
    scales = (scale, scale + 1)  # the latter as Gemma has it
    return [FusedRMSNorm(module.weight, s, eps, kernels) for s in scales]


def _same(module: nn.Module, fused: nn.Module, call: Call) -> bool:
    """Whether both give the same."""
    expected = module(*call.args, **call.kwargs)
    try:
        found = fused(*call.args, **call.kwargs)
    except (AssertionError, AttributeError, RuntimeError, TypeError):
        return False  # it takes other arguments, or another dtype
    return about_equal(found, expected)


def about_equal(found: Any, expected: Any) -> bool:
    """Whether two tensors of one dtype differ by no more than a fused layer's rounding."""
    if not isinstance(expected, torch.Tensor) or found.shape != expected.shape:
        return False
    off = ((found - expected).float().norm() / expected.float().norm()).item()
    allowed = ALLOWED_EPS * torch.finfo(expected.dtype).eps
    return found.dtype == expected.dtype and bool(off <= allowed)

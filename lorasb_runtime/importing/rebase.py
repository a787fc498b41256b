"""Deltas onto a basis: the nearest core for each target, and exactly how far it is away.

R' = (s / s') pinv(B') B R A pinv(A') in float64: the best in Frobenius norm, exact where the spans
of B' and A' contain those of B and A.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasb_runtime.errors import BasisMismatchError
from lorasb_runtime.importing.foreign import Delta, ForeignAdapter, Report
from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.storage.basis_file import Basis

# Directions of a basis that are shorter than this share of its longest are rounding of float32.
SHORTEST = 1e-6


@dataclass(frozen=True)
class Fit:
    """How near a core comes to a delta: two Frobenius norms; sums over modules are allowed."""

    delta: float = 0.0  # |delta|^2
    error: float = 0.0  # |delta - scaling B R A|^2, R as it is stored

    def __add__(self, other: "Fit") -> "Fit":
        return Fit(self.delta + other.delta, self.error + other.error)

    @property
    def relative_error(self) -> float:
        """|delta - scaling B R A| / |delta|; 0 for a delta of zero."""
        return math.sqrt(self.error / self.delta) if self.delta else 0.0


@dataclass(frozen=True)
class Rebased:
    """cores: [D] in float32. fits: by module; one that is no target of the basis is lost whole."""

    cores: torch.Tensor
    fits: dict[str, Fit]

    @property
    def total(self) -> Fit:
        return sum(self.fits.values(), Fit())


@dataclass(frozen=True)
class Frame:
    """One target's pair by its QR decompositions, B = q_b t_b and A = t_a q_a', in float64.

    from_b and from_a are the pseudo-inverses of t_b and t_a.
    """

    q_b: torch.Tensor
    t_b: torch.Tensor
    q_a: torch.Tensor
    t_a: torch.Tensor
    from_b: torch.Tensor
    from_a: torch.Tensor


def rebase_all(
    adapters: Sequence[ForeignAdapter], basis: Basis, report: Report = lambda *_: None
) -> list[Rebased]:
    """Each adapter's cores on `basis`, float32, with the error of what is stored.

    Raises BasisMismatchError for a module of another shape than its target, and for an adapter of
    which no module is a target.
    """
    for adapter in adapters:
        _check(adapter, basis)
    results = [Rebased(torch.zeros(basis.size), {}) for _ in adapters]
    for index, target in enumerate(basis.targets):
        frame = _frame(basis, target.module)
        for adapter, result in zip(adapters, results, strict=True):
            delta = adapter.modules.get(target.module)
            if delta is not None:
                core, fit = _rebase(delta, frame, basis.scaling)
                basis.core(result.cores, index).copy_(core)
                result.fits[target.module] = fit
        report("re-base", index + 1, len(basis.targets), target.module)
    for adapter, result in zip(adapters, results, strict=True):
        for module, delta in adapter.modules.items():
            if module not in result.fits:
                result.fits[module] = _lost(delta)
    return results


def _frame(basis: Basis, module: str) -> Frame:
    q_b, t_b = torch.linalg.qr(basis.b(module).double())
    q_a, t_a = torch.linalg.qr(basis.a(module).double().t())
    from_b = torch.linalg.pinv(t_b, rtol=SHORTEST)
    from_a = torch.linalg.pinv(t_a.t(), rtol=SHORTEST)
    return Frame(q_b, t_b, q_a, t_a.t(), from_b, from_a)


def _rebase(delta: Delta, frame: Frame, scaling: float) -> tuple[torch.Tensor, Fit]:
    inside = delta.project(frame.q_b, frame.q_a)
    core = (frame.from_b @ inside.core @ frame.from_a / scaling).float()
    stored = frame.t_b @ scale_core(core.double(), scaling) @ frame.t_a
    missed = (inside.core - stored).norm().item()
    return core, Fit(inside.norm**2, inside.residual**2 + missed**2)


def _lost(delta: Delta) -> Fit:
    nothing = torch.zeros(delta.out_features, 0, dtype=torch.float64)
    norm = delta.project(nothing, torch.zeros(delta.in_features, 0, dtype=torch.float64)).norm
    return Fit(norm**2, norm**2)


def _check(adapter: ForeignAdapter, basis: Basis) -> None:
    targets = {t.module: t for t in basis.targets}
    for module, delta in adapter.modules.items():
        target = targets.get(module)
        if target is None:
            continue
        found = [delta.out_features, delta.in_features]
        expected = [target.out_features, target.in_features]
        if found != expected:
            raise BasisMismatchError(
                f"{adapter.source}: found {module} of shape {found}, expected the basis' {expected}"
            )
    if not targets.keys() & adapter.modules.keys():
        raise BasisMismatchError(
            f"{adapter.source}: found no target of the basis among its modules, such as "
            f"{next(iter(adapter.modules))}; expected some, such as {basis.targets[0].module}"
        )

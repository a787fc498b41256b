"""How far apart two bases' subspaces are, module by module."""

import math
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.inspecting.difference import Difference
from lorasb_runtime.storage.basis_file import Basis, map_basis


def diff_bases(a: Path, b: Path) -> Difference:
    """Principal angles between the spans of B's columns and of A's rows, in degrees.

    overlap: the share of a random core's energy on the first basis that the second can hold, if B
    and A are orthonormal. Raises what `map_basis` raises.
    """
    one, other = map_basis(a), map_basis(b)
    mine, theirs = ({t.module: t for t in basis.targets} for basis in (one, other))
    shared = [m for m in mine if m in theirs and _shape(one, m) == _shape(other, m)]
    rows = sorted((_row(one, other, module) for module in shared), key=lambda r: r["overlap"])
    facts: dict[str, Any] = {
        "a": _describe(one),
        "b": _describe(other),
        "same": one.digest == other.digest,
        "only_in_a": [m for m in mine if m not in theirs],
        "only_in_b": [m for m in theirs if m not in mine],
        "of_other_shape": [m for m in mine if m in theirs and m not in shared],
    }
    if rows:
        facts["overlap"] = sum(row["overlap"] for row in rows) / len(rows)
    return Difference("basis", facts, tuple(rows))


def principal_angles(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Angles in radians, ascending, between the spans of two matrices' columns, in float64.

    Small ones from sines, large ones from cosines (Bjorck and Golub 1973), so that both are exact.
    """
    p, q = (torch.linalg.qr(x.double()).Q for x in (one, other))
    if p.shape[1] < q.shape[1]:
        p, q = q, p
    cosines = torch.linalg.svdvals(p.t() @ q).clamp_max(1.0)
    sines = torch.linalg.svdvals(q - p @ (p.t() @ q)).flip(0).clamp_max(1.0)
    return torch.where(sines.square() < 0.5, sines.asin(), cosines.acos())


def _row(one: Basis, other: Basis, module: str) -> dict[str, Any]:
    angles = (
        principal_angles(one.b(module), other.b(module)),
        principal_angles(one.a(module).t(), other.a(module).t()),
    )
    rank = one.a(module).shape[0]
    kept = [angle.cos().square().sum().item() / rank for angle in angles]
    return {
        "module": module,
        "rank_a": rank,
        "rank_b": other.a(module).shape[0],
        "overlap": kept[0] * kept[1],
        "largest_angle_B": math.degrees(angles[0].max().item()),
        "mean_angle_B": math.degrees(angles[0].mean().item()),
        "largest_angle_A": math.degrees(angles[1].max().item()),
        "mean_angle_A": math.degrees(angles[1].mean().item()),
    }


def _shape(basis: Basis, module: str) -> tuple[int, int]:
    return basis.b(module).shape[0], basis.a(module).shape[1]


def _describe(basis: Basis) -> dict[str, Any]:
    return {
        "digest": basis.digest,
        "method": basis.method,
        "scaling": basis.scaling,
        "targets": len(basis.targets),
        "base_model": basis.base_model.as_json() if basis.base_model else None,
    }

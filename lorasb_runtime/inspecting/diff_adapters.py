"""How far apart two adapters of one basis are, as a whole and in each module."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.errors import BasisMismatchError
from lorasb_runtime.inspecting.difference import Difference
from lorasb_runtime.inspecting.weight_space import WeightSpace
from lorasb_runtime.storage.adapter_file import check_basis, load_adapter
from lorasb_runtime.storage.basis_file import map_basis


def diff_adapters(a: Path, b: Path, basis_path: Path | None) -> Difference:
    """Distance and angle, and with the basis those of each module's delta."""
    one, other = load_adapter(a), load_adapter(b)
    if one.basis != other.basis or one.cores.shape != other.cores.shape:
        raise BasisMismatchError(
            f"{b}: found an adapter of {other.cores.numel()} numbers for basis {other.basis}, "
            f"expected one of {one.cores.numel()} for {one.basis}, as {a} is"
        )
    rows: list[dict[str, Any]] = []
    if basis_path is None:
        whole = _Pair.of(one.cores.double(), other.cores.double())
        of = "cores; for the merged weights, and for each module, pass --basis"
    else:
        basis = map_basis(basis_path)
        check_basis(one, basis, str(a))
        space = WeightSpace(basis)
        pairs = [
            _Pair.of(space.core(one.cores, index), space.core(other.cores, index))
            for index in range(len(basis.targets))
        ]
        whole = sum(pairs, _Pair())
        of = "merged weights"
        for target, pair in zip(basis.targets, pairs, strict=True):
            share = pair.apart / whole.apart if whole.apart else 0.0
            rows.append({"module": target.module, **pair.as_json(), "share": share})
        rows.sort(key=lambda row: -row["distance"])
    facts = {
        "a": {"name": one.name, "version": one.version},
        "b": {"name": other.name, "version": other.version},
        "basis": one.basis,
        "of": of,
        **whole.as_json(),
    }
    return Difference("adapter", facts, tuple(rows))


@dataclass(frozen=True)
class _Pair:
    """Sums of squares of two vectors, their product and their difference; modules add up."""

    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    apart: float = 0.0

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> "_Pair":
        squares = (a.square(), b.square(), a * b, (a - b).square())
        return cls(*(value.sum().item() for value in squares))

    def __add__(self, other: "_Pair") -> "_Pair":
        return _Pair(
            self.a + other.a,
            self.b + other.b,
            self.product + other.product,
            self.apart + other.apart,
        )

    def as_json(self) -> dict[str, Any]:
        """cosine: None where one of them is zero."""
        norms = math.sqrt(self.a) * math.sqrt(self.b)
        return {
            "distance": math.sqrt(self.apart),
            "norm_a": math.sqrt(self.a),
            "norm_b": math.sqrt(self.b),
            "cosine": self.product / norms if norms else None,
        }

"""What looking at something gives: facts, and a row for each module or adapter in it."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from lorasb_runtime.inspecting.distances import distance_matrix
from lorasb_runtime.types import TargetModule


@dataclass(frozen=True)
class ModuleRow:
    """One target module. spectrum: descending, empty where it has none."""

    module: str
    out_features: int
    in_features: int
    rank: int
    spectrum: tuple[float, ...] = ()

    @staticmethod
    def of(target: TargetModule, spectrum: tuple[float, ...]) -> "ModuleRow":
        return ModuleRow(
            target.module, target.out_features, target.in_features, target.rank, spectrum
        )

    @property
    def norm(self) -> float:
        """Root of the sum of squares: of singular values the Frobenius norm."""
        return math.hypot(*self.spectrum)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the values as shares of their sum; 0 for zero.

        Roy and Vetterli, "The effective rank", EUSIPCO 2007.
        """
        total = math.fsum(self.spectrum)
        shares = [value / total for value in self.spectrum if value > 0] if total else []
        return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0

    def as_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "module": self.module,
            "out": self.out_features,
            "in": self.in_features,
            "rank": self.rank,
        }
        if self.spectrum:
            shown["norm"] = self.norm
            shown["effective_rank"] = self.effective_rank
            shown["spectrum"] = list(self.spectrum)
        return shown


@dataclass(frozen=True)
class AdapterRow:
    """One adapter of a collection; norm: of its delta over all modules."""

    name: str
    version: str
    nbytes: int
    norm: float
    nearest: str | None = None
    distance: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "bytes": self.nbytes,
            "norm": self.norm,
            "nearest": self.nearest,
            "distance": self.distance,
        }


@dataclass(frozen=True)
class Inspection:
    """kind: basis, adapter, adapters (a store, a pack, a folder), checkpoint or model.

    facts: in the order to show them, JSON values alone. spectrum_of: what the modules' spectra
    are. gram: inner products of the adapters, [n, n] float64; distance_of says
    what of them is meant. tensors: of a model. notes: what a person should know beside the facts.
    """

    kind: str
    source: str
    facts: dict[str, Any]
    modules: tuple[ModuleRow, ...] = ()
    spectrum_of: str = ""
    adapters: tuple[AdapterRow, ...] = ()
    gram: torch.Tensor | None = None
    distance_of: str = ""
    tensors: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"kind": self.kind, "source": self.source, **self.facts}
        if self.modules:
            shown["spectrum_of"] = self.spectrum_of
            shown["modules"] = [row.as_json() for row in self.modules]
        if self.adapters:
            shown["adapters"] = [row.as_json() for row in self.adapters]
        if self.gram is not None:
            shown["distance_of"] = self.distance_of
            shown["distances"] = distance_matrix(self.gram).tolist()
        if self.tensors:
            shown["tensors"] = list(self.tensors)
        shown["notes"] = list(self.notes)
        return shown

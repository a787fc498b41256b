"""What every reader makes of a foreign checkpoint: one delta for each module, and its origin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lorasb_runtime.basis.pair import BasisPair
from lorasb_runtime.basis.svd import fix_signs
from lorasb_runtime.ops.core_matmul import scale_core

Report = Callable[[str, int, int, str], None]  # phase, done, total, note


@dataclass(frozen=True)
class Projection:
    """A delta on an orthonormal pair: core [r, r] in float64, and two Frobenius norms.

    norm: of the whole delta. residual: of what lies outside of the pair, so that
    norm^2 = |core|^2 + residual^2.
    """

    core: torch.Tensor
    norm: float
    residual: float


class Delta(Protocol):
    """One module's change of its weight, [out, in] whichever way round the checkpoint stores it."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    def project(self, q_b: torch.Tensor, q_a: torch.Tensor) -> Projection:
        """The part inside of the orthonormal columns q_b [out, r] and q_a [in, r], in float64."""

    def pair(self, rank: int | None) -> BasisPair:
        """The orthonormal B and A that hold most of it; of its own rank where `rank` is None."""


@dataclass(frozen=True)
class Factors:
    """scaling * B core A. b: [out, r], a: [r, in], in any float dtype.

    core: [r, r], the diagonal [r] of one, or None for the identity. whole: the delta that a pair
    is made for, where this one is a part of it.
    """

    b: torch.Tensor
    a: torch.Tensor
    core: torch.Tensor | None = None
    scaling: float = 1.0
    whole: "Factors | None" = None

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    def project(self, q_b: torch.Tensor, q_a: torch.Tensor) -> Projection:
        """Without a dense delta, and without subtracting norms, which would cancel.

        With B and A each split into the parts inside and outside of the pair, the residual is
        B_out A + B_in A_out, two orthogonal terms whose norms are small where the residual is.
        """
        left, right = self._left(), self.a.double()
        left_in, right_in = q_b.t() @ left, right @ q_a
        left_out, right_out = left - q_b @ left_in, right - right_in @ q_a.t()
        outside = (_norm(left_out, right), _norm(left_in, right_out))
        residual = torch.tensor(outside, dtype=torch.float64).norm().item()
        return Projection(left_in @ right_in, _norm(left, right), residual)

    def pair(self, rank: int | None) -> BasisPair:
        if self.whole is not None:
            return self.whole.pair(rank)
        q_b, t_b = torch.linalg.qr(self._left())
        q_a, t_a = torch.linalg.qr(self.a.double().t())
        u, _, vt = torch.linalg.svd(t_b @ t_a.t(), full_matrices=False)
        b, a = fix_signs(q_b @ u, vt @ q_a.t())
        return BasisPair(b[:, :rank].float().contiguous(), a[:rank].float().contiguous())

    def _left(self) -> torch.Tensor:
        """scaling * B core, [out, r] in float64."""
        b = self.b.double()
        if self.core is None:
            return scale_core(b, self.scaling)
        core = scale_core(self.core.double(), self.scaling)
        return b * core if core.dim() == 1 else b @ core


def _norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """|left @ right| from the two triangles of their QR decompositions, never formed as a whole."""
    t_left, t_right = torch.linalg.qr(left).R, torch.linalg.qr(right.t()).R
    return float((t_left @ t_right.t()).norm().item())


@dataclass(frozen=True)
class ForeignAdapter:
    """A checkpoint of another program, as exactly as it was written.

    source: the folder, for errors. format: the reader's name. shared: A and B are a frozen basis
    that other adapters may share, and the modules are Factors with square cores; otherwise they
    are this adapter's own. modules: in the model's order. transposed: modules whose weight the
    model stores as [in, out]. base_model: the name that it gives, unverified.
    """

    source: str
    format: str
    modules: Mapping[str, Delta]
    shared: bool = False
    transposed: frozenset[str] = frozenset()
    base_model: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

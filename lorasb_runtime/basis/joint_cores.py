"""From the joint subspaces of many deltas to B, A, a core for each delta, and what that loses."""

from dataclasses import dataclass

import torch

from lorasb_runtime.basis.joint import captured, joint_subspaces
from lorasb_runtime.basis.stack import Batch, Stack


@dataclass(frozen=True)
class JointModule:
    """One module's joint basis and what became of the deltas, in the order of the stack.

    b: [out, r], a: [r, in], float32; orthonormal but for the rounding, strongest direction first.
    cores: [count, r, r] float32. norms, errors: [count] float64, |dW| and |dW - B R A| of what b,
    a and cores hold, their rounding to float32 included. A place without a delta is zero in all.
    spectrum: [r] float32, descending: s_j^2 is the share of a normalised delta that lies along
    column j of b, a mean over the deltas; so their sum is 1 minus the mean squared error.
    """

    b: torch.Tensor
    a: torch.Tensor
    cores: torch.Tensor
    norms: torch.Tensor
    errors: torch.Tensor
    spectrum: torch.Tensor


def joint_module(stack: Stack, rank: int, seed: int = 0) -> JointModule:
    """The best joint basis of rank `rank` at most for a stack that is not empty, and its cores."""
    u, v, spectrum = _by_strength(stack, *joint_subspaces(stack, rank, seed))
    count, width = stack.count, u.shape[1]
    cores = torch.zeros(count, width, width)
    norms, errors = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    left, right = _Triangular(u), _Triangular(v)
    for piece in stack.pieces():
        core, norm, error = _project(piece, left, right)
        cores[piece.places] = core
        norms[piece.places], errors[piece.places] = norm, error
    return JointModule(u, v.t().contiguous(), cores, norms, errors, spectrum)


def _by_strength(stack: Stack, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """U and V turned within their spans to the principal directions, and the spectrum of U's.

    Signs are fixed: the entry of largest magnitude of each column is positive.
    """
    left, right = (torch.zeros(u.shape[1], u.shape[1], dtype=torch.float64) for _ in range(2))
    deltas = 0
    for piece in stack.pieces():
        cores = captured(piece, u.float(), v.float()) * piece.weights.float().sqrt()[:, None, None]
        left += torch.einsum("nij,nkj->ik", cores, cores)
        right += torch.einsum("nji,njk->ik", cores, cores)
        deltas += len(piece.places)
    values, turn = torch.linalg.eigh(left)
    u = _positive_peaks(u @ turn.flip(1))
    v = _positive_peaks(v @ torch.linalg.eigh(right).eigenvectors.flip(1))
    return u.float(), v.float(), (values.flip(0).clamp_min(0.0) / deltas).sqrt().float()


def _positive_peaks(x: torch.Tensor) -> torch.Tensor:
    peak = x.abs().argmax(dim=0, keepdim=True)
    return x * torch.where(x.gather(0, peak) < 0, -1.0, 1.0)


class _Triangular:
    """x [d, r] = q @ t in float64: what x, rounded as it is, spans, and how it stands in that."""

    def __init__(self, x: torch.Tensor) -> None:
        self.q, self.t = torch.linalg.qr(x.double())
        self.inverse = torch.linalg.inv(self.t)  # t is the identity but for x's rounding

    def split(self, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of rows [n, k, d]: their coordinates in q [n, k, r], and what is outside [n, k, d]."""
        inside = side @ self.q
        return inside, side - inside @ self.q.t()


def _project(
    batch: Batch, left: _Triangular, right: _Triangular
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cores that fit best, rounded to float32 [n, r, r]; |dW| and |dW - B R A|, [n] float64.

    With x and y the factors' parts within the spans of q and xo, yo what is left of them, a delta
    is four parts that are orthogonal to one another, x'y + x'yo + xo'y + xo'yo. The core misses
    the last three and its rounding error in the first: a sum of squares, where nothing cancels.
    """
    x, xo = left.split(batch.left.double())
    y, yo = right.split(batch.right.double())
    inside = x.transpose(1, 2) @ y
    gain = batch.gain[:, None, None]
    core = (left.inverse @ (gain * inside) @ right.inverse.t()).float()
    missed = inside - left.t @ (core.double() / gain) @ right.t.t()
    triangle = torch.linalg.qr(xo.transpose(1, 2), mode="r").R
    parts = (x.transpose(1, 2) @ yo, xo.transpose(1, 2) @ y, triangle @ yo)
    outside = sum((_squares(part) for part in parts), torch.zeros(len(inside)).double())
    norm, error = (_squares(inside) + outside).sqrt(), (_squares(missed) + outside).sqrt()
    return core, norm * batch.gain.abs(), error * batch.gain.abs()


def _squares(x: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=(1, 2))
    return norms.square()

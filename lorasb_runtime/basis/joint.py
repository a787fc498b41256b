"""Joint diagonalisation (JD-Full of arXiv 2407.00066): one basis for many low-rank deltas.

Orthonormal U [out, r] and V [in, r] that keep the most of the normalised deltas:
the maximum of sum_i |U.T dW_i V|^2 / |dW_i|^2, found by turns for U and for V. No delta is formed.
"""

import math

import torch

from lorasb_runtime.basis.stack import Batch, Stack

EXTRA = 64  # directions beside twice the rank, in which the first sweeps run
SKETCH_PASSES = 2
DENSE_SWEEPS = 25
SWEEPS = 10  # over the whole factors
TOLERANCE = 1e-3  # a subspace has settled when its sines, squared, have a mean under its square
SPAN_EXTRA = 8
SPAN_TOLERANCE = 2e-7  # of the strongest direction

Pair = tuple[torch.Tensor, torch.Tensor]


def joint_subspaces(stack: Stack, rank: int, seed: int = 0) -> Pair:
    """U [out, r] and V [in, r], float64 with orthonormal columns; r is `rank` at most.

    Where `rank` holds the spans of all deltas they are exact, and r is no larger than the spans
    need. Elsewhere r is min(rank, out, in), and the sweeps start from the best 2 * rank + EXTRA
    directions of each side, among which they are cheap.
    """
    limit = min(rank, *stack.shape)
    generator = torch.Generator().manual_seed(seed)
    exact = _spans(stack, limit, generator)
    if exact is not None:
        return exact
    width = 2 * limit + EXTRA
    left = _sketch(stack, width, generator)
    right = _sketch(stack.mirrored, width, generator)
    small = _project(stack, left, right)
    u, v = _dense_sweeps(small, limit)
    if left is not None or right is not None:
        u = u if left is None else left @ u
        v = v if right is None else right @ v
        u, v = _sweeps(stack, u, v)
    return _orthonormal(u.double()), _orthonormal(v.double())


def captured(batch: Batch, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The cores U.T @ left.T @ right @ V of a batch, [n, r, r] in the dtype of u and v."""
    return (batch.left.to(u.dtype) @ u).transpose(1, 2) @ (batch.right.to(v.dtype) @ v)


def _spans(stack: Stack, limit: int, generator: torch.Generator) -> Pair | None:
    """Bases of the columns' and the rows' span, of one width, where both are within `limit`."""
    left = _span(stack, limit, generator)
    right = None if left is None else _span(stack.mirrored, limit, generator)
    if left is None or right is None:
        return None
    width = max(left.shape[1], right.shape[1])
    return _widen(left, width, generator), _widen(right, width, generator)


def _span(stack: Stack, limit: int, generator: torch.Generator) -> torch.Tensor | None:
    """Orthonormal float64 basis of all columns, [out, p] with p <= limit; None where p is more.

    As many random sums of the columns as can be independent have the span of all of them. Columns
    count by how strongly they are used, and what float32's rounding alone adds does not.
    """
    total = torch.zeros(stack.shape[0], limit + SPAN_EXTRA, dtype=torch.float64)
    basis = total
    for piece in stack.pieces():
        strength = piece.right.norm(dim=2, keepdim=True).double()
        columns = (strength * piece.left).flatten(0, 1)
        mixed = torch.randn(len(columns), total.shape[1], generator=generator)
        total += columns.t() @ mixed.double()
        u, s, _ = torch.linalg.svd(total, full_matrices=False)
        basis = u[:, s > SPAN_TOLERANCE * s[0]]
        if basis.shape[1] > limit:
            return None
    return basis


def _widen(basis: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal [d, width] whose first columns span `basis`."""
    missing = width - basis.shape[1]
    if not missing:
        return basis
    more = torch.randn(basis.shape[0], missing, generator=generator).to(basis)
    return _orthonormal(torch.cat([basis, more], dim=1))


def _sketch(stack: Stack, width: int, generator: torch.Generator) -> torch.Tensor | None:
    """About the `width` strongest directions of the columns of all normalised deltas, [out, width].

    None where there are no more rows than that. Randomised subspace iteration.
    """
    rows = stack.shape[0]
    if width >= rows:
        return None
    others = [_weighted_gram(batch, batch.right) for batch in stack.batches]
    x = torch.randn(rows, width, generator=generator)
    for _ in range(SKETCH_PASSES):
        x = _orthonormal(_apply(stack, others, x))
    return x


def _project(stack: Stack, left: torch.Tensor | None, right: torch.Tensor | None) -> Stack:
    """The deltas in the coordinates of the sketches."""
    batches = (
        Batch(
            b.left if left is None else b.left @ left,
            b.right if right is None else b.right @ right,
            *(b.weights, b.gain, b.places),
        )
        for b in stack.batches
    )
    return Stack(tuple(batches), stack.count)


def _dense_sweeps(stack: Stack, rank: int) -> Pair:
    """U and V of a stack with few rows and columns, by eigenvectors of small square matrices."""
    mirror = stack.mirrored
    u = _strongest(stack, [_weighted_gram(b, b.right) for b in stack.batches], rank)
    v = _strongest(mirror, [_weighted_gram(b, b.left) for b in stack.batches], rank)
    for _ in range(DENSE_SWEEPS):
        before = u, v
        u = _strongest(stack, _seen(mirror, v), rank)
        v = _strongest(mirror, _seen(stack, u), rank)
        if max(_turned(u, before[0]), _turned(v, before[1])) < TOLERANCE:
            break
    return u, v


def _sweeps(stack: Stack, u: torch.Tensor, v: torch.Tensor) -> Pair:
    """The same with all rows and columns, one step of subspace iteration at a time.

    No step lowers what U and V keep.
    """
    mirror = stack.mirrored
    for _ in range(SWEEPS):
        before = u, v
        u = _orthonormal(_apply(stack, _seen(mirror, v), u))
        v = _orthonormal(_apply(mirror, _seen(stack, u), v))
        if max(_turned(u, before[0]), _turned(v, before[1])) < TOLERANCE:
            break
    return u, v


def _seen(stack: Stack, x: torch.Tensor) -> list[torch.Tensor]:
    """For each batch the weighted Gram matrices [n, k, k] of the left factors within x."""
    return [_weighted_gram(batch, batch.left @ x) for batch in stack.batches]


def _weighted_gram(batch: Batch, side: torch.Tensor) -> torch.Tensor:
    return batch.weights.float()[:, None, None] * (side @ side.transpose(1, 2))


def _apply(stack: Stack, others: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """sum_i left_i.T @ others_i @ left_i @ x, [out, width]."""
    total = torch.zeros_like(x)
    for batch, other in zip(stack.batches, others, strict=True):
        seen = other @ (batch.left @ x)
        total += batch.left.flatten(0, 1).t() @ seen.flatten(0, 1)
    return total


def _strongest(stack: Stack, others: list[torch.Tensor], rank: int) -> torch.Tensor:
    """The first `rank` eigenvectors of sum_i left_i.T @ others_i @ left_i, [out, rank]."""
    total = torch.zeros(stack.shape[0], stack.shape[0])
    for batch, other in zip(stack.batches, others, strict=True):
        total += batch.left.flatten(0, 1).t() @ (other @ batch.left).flatten(0, 1)
    vectors: torch.Tensor = torch.linalg.eigh(total).eigenvectors
    return vectors[:, -rank:].flip(1).contiguous()


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(x).Q
    return q


def _turned(new: torch.Tensor, old: torch.Tensor) -> float:
    """Root mean square sine of the principal angles between two subspaces."""
    away = new - old @ (old.t() @ new)
    return math.sqrt(float(away.square().mean(dim=1).sum()))

"""Truncated singular value decomposition in float32, the same on every run."""

import torch

# Small matrices are decomposed whole; above, the randomised method is many times cheaper.
FULL_SVD_LIMIT = 256
PASSES = 16
SEED = 0x5B


def truncated_svd(
    matrix: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, rank], S [rank] (descending), Vt [rank, in] of a float32 matrix [out, in].

    Randomised subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4) with a
    generator of its own and as many extra directions as the rank, at least 32: a sign matrix has
    a flat spectrum, on which plain sketches are poor. Signs are as `fix_signs` makes them.
    """
    if min(matrix.shape) <= max(FULL_SVD_LIMIT, 2 * rank):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = _randomised(matrix, rank)
    u, vt = fix_signs(u[:, :rank], vt[:rank])
    return u, s[:rank].contiguous(), vt


def fix_signs(u: torch.Tensor, vt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same singular vectors, u [out, r] and vt [r, in], each pair with the sign of our choice.

    The entry of largest magnitude of each left singular vector is positive.
    """
    peak = u.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(u.gather(0, peak)[0] < 0, -1.0, 1.0).to(u.dtype)
    return (u * signs).contiguous(), (vt * signs[:, None]).contiguous()


def _randomised(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = min(rank + max(32, rank), *matrix.shape)
    generator = torch.Generator().manual_seed(SEED)
    sketch = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    q = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(PASSES):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return q @ u, s, vt

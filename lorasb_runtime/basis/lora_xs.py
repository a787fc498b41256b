"""LoRA-XS (arXiv 2405.17604): the basis of the weight itself."""

import torch

from lorasb_runtime.basis.pair import BasisPair
from lorasb_runtime.basis.svd import truncated_svd


def make_pair(weight: torch.Tensor, rank: int) -> BasisPair:
    """B = U_r orthonormal, A = diag(S_r) Vt_r, from one weight [out, in].

    This is the published code's convention; papers that restate it put the singular values in B.
    """
    u, s, vt = truncated_svd(weight.float(), rank)
    return BasisPair(b=u, a=s[:, None] * vt)

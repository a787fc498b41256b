"""LoRA-SB (arXiv 2411.19557, section 2.4): the basis of the first full fine-tuning step."""

import torch

from lorasb_runtime.basis.pair import BasisPair
from lorasb_runtime.basis.svd import truncated_svd


def make_pair(gradient: torch.Tensor, rank: int) -> BasisPair:
    """B, A orthonormal and R0 from the summed gradient [out, in] of one weight.

    The first AdamW step at rate 1 is -sign(gradient). B and A are the singular vectors of the
    sign, R0 = -diag(S) holds the minus sign, so that B @ R0 @ A is that step's best rank-r part.
    """
    u, s, vt = truncated_svd(gradient.float().sign(), rank)
    return BasisPair(b=u, a=vt, r0=-torch.diag(s))

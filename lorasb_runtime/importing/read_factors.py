"""Factors from named tensors, checked to fit together before anything is computed from them."""

import torch

from lorasb_runtime.importing.folder import TensorFile
from lorasb_runtime.importing.foreign import Factors


def read_factors(
    file: TensorFile,
    module: str,
    a_name: str,
    b_name: str,
    scaling: float,
    core: torch.Tensor | None = None,
) -> Factors:
    """B and A of one module, with a core that has been read already.

    Raises FileFormatError where dtypes, dimensions, ranks or numbers are not what they must be.
    """
    a, b = file.tensor(a_name, 2), file.tensor(b_name, 2)
    rank = a.shape[0]
    if b.shape[1] != rank:
        found = f"{module} with A of shape {list(a.shape)} and B of shape {list(b.shape)}"
        raise file.wrong(found, "one rank in both")
    if core is not None and any(size != rank for size in core.shape):
        found = f"{module} with a core of shape {list(core.shape)}"
        raise file.wrong(found, f"the rank {rank} of its A and B")
    return Factors(b, a, core, scaling)

"""The dtypes that a user can name."""

import torch

from lorasb_runtime.errors import InputError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by its name. Raises InputError for one that is not supported."""
    if name not in DTYPES:
        raise InputError(f"dtype: found {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]

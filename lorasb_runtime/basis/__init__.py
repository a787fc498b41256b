"""Ways of making a basis: each a pure function of one module's matrix, in a file of its own.

A new method is one new file and one entry in METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorasb_runtime.basis import lora_sb, lora_xs
from lorasb_runtime.basis.pair import BasisPair
from lorasb_runtime.errors import InputError

# Makes B, A and perhaps R0 of a given rank from one matrix [out, in].
MakePair = Callable[[torch.Tensor, int], BasisPair]


@dataclass(frozen=True)
class BasisMethod:
    """`needs_gradient`: the matrix is the summed gradient of the weight, else the weight itself."""

    make_pair: MakePair
    needs_gradient: bool


METHODS: dict[str, BasisMethod] = {
    "lora-sb": BasisMethod(lora_sb.make_pair, needs_gradient=True),
    "lora-xs": BasisMethod(lora_xs.make_pair, needs_gradient=False),
}


def find_method(name: str) -> BasisMethod:
    """A method by its name. Raises InputError, listing what there is."""
    if name not in METHODS:
        raise InputError(f"method: found {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "BasisMethod", "BasisPair", "MakePair", "find_method"]

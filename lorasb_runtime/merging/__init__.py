"""Merging: combine (adapters into one) and fold (an adapter into weights).

A merge method is a plain function in a file of its own; a new one is an entry in METHODS.
"""

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging import linear
from lorasb_runtime.merging.weighted import CombineCores

METHODS: dict[str, CombineCores] = {"linear": linear.combine}


def find_method(name: str) -> CombineCores:
    """A merge method by its name. Raises InputError, listing what there is."""
    if name not in METHODS:
        raise InputError(f"method: found {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "CombineCores", "find_method"]

"""Merging: combine (adapters into one) and fold (an adapter into weights).

A merge method is a plain function in a file of its own; a new one is an entry in METHODS.
"""

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging import dare_linear, dare_ties, linear, slerp, task_arithmetic, ties
from lorasb_runtime.merging.method import MergeMethod, Part, Space

_TABLE = (
    MergeMethod("linear", linear.merge, Space.CORES),
    MergeMethod("task-arithmetic", task_arithmetic.merge, Space.CORES),
    MergeMethod("slerp", slerp.merge, Space.ORTHONORMAL, count=2, ordered=True),
    MergeMethod("core-ties", ties.merge, Space.CORE),
    MergeMethod("core-dare", dare_linear.merge, Space.CORE),
    MergeMethod("ties", ties.merge, Space.DELTA),
    MergeMethod("dare-linear", dare_linear.merge, Space.DELTA),
    MergeMethod("dare-ties", dare_ties.merge, Space.DELTA),
)
METHODS: dict[str, MergeMethod] = {method.name: method for method in _TABLE}


def find_method(name: str) -> MergeMethod:
    """A merge method by its name, without options. Raises InputError, listing what there is."""
    if name not in METHODS:
        raise InputError(f"method: found {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "MergeMethod", "Part", "Space", "find_method"]

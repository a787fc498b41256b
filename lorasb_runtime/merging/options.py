"""The options of merge methods: types that say which values there are, and the one check of them.

A method's options are its keyword-only parameters; their annotations are what is checked.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from lorasb_runtime.errors import InputError


@dataclass(frozen=True)
class Limits:
    """The least and the greatest value of an option; with `above`, the least itself is none."""

    least: float
    greatest: float
    above: bool = False


Density = Annotated[float, Limits(0.0, 1.0, above=True)]
Share = Annotated[float, Limits(0.0, 1.0)]
Seed = Annotated[int, Limits(0, 2**63 - 1)]
MajoritySign = Literal["total", "frequency"]


def find_options(merge: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of `merge`: its keyword-only parameters, by name.

    An option's name is its parameter's, without the underscore after a Python keyword.
    """
    return {
        name.rstrip("_"): parameter
        for name, parameter in inspect.signature(merge).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def check_options(
    method: str, merge: Callable[..., Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """All the options of `merge` by name: those given, checked, and the defaults of the others.

    Raises InputError for one that the method does not take, one that it needs, and a wrong value.
    """
    taken = find_options(merge)
    for name in sorted(given.keys() - taken.keys()):
        raise InputError(
            f"method {method}: found option {_shown(name)}, expected only "
            f"{', '.join(map(_shown, sorted(taken)))}"
        )
    hints = get_type_hints(merge, include_extras=True)
    checked = {}
    for name, parameter in taken.items():
        if name in given:
            _check_value(f"method {method}: {_shown(name)}", hints[parameter.name], given[name])
        elif parameter.default is inspect.Parameter.empty:
            raise InputError(f"method {method}: found no {_shown(name)}, expected one")
        checked[name] = given.get(name, parameter.default)
    return checked


def as_keywords(merge: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name as keyword arguments of `merge`."""
    taken = find_options(merge)
    return {taken[name].name: value for name, value in options.items()}


def _shown(name: str) -> str:
    return name.replace("_", "-")


def _check_value(label: str, hint: Any, value: Any) -> None:
    kind, limits = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{label}: found {value!r}, expected {' or '.join(get_args(kind))}")
    elif kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{label}: found {value!r}, expected true or false")
    else:
        _check_number(label, kind, limits, value)


def _check_number(label: str, kind: type, limits: Limits | None, value: Any) -> None:
    accepted = int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, accepted) or not math.isfinite(value):
        wanted = "a whole number" if kind is int else "a finite number"
        raise InputError(f"{label}: found {value!r}, expected {wanted}")
    if limits is None:
        return
    too_low = value <= limits.least if limits.above else value < limits.least
    if too_low or value > limits.greatest:
        start = "above" if limits.above else "from"
        raise InputError(
            f"{label}: found {value!r}, expected one {start} {limits.least} to {limits.greatest}"
        )

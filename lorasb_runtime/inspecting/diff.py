"""How two adapters, two bases or two models differ."""

from pathlib import Path

from lorasb_runtime.errors import InputError
from lorasb_runtime.inspecting.diff_adapters import diff_adapters
from lorasb_runtime.inspecting.diff_bases import diff_bases
from lorasb_runtime.inspecting.diff_models import diff_models
from lorasb_runtime.inspecting.difference import Difference
from lorasb_runtime.inspecting.inspect import kind_of
from lorasb_runtime.types import Report


def diff(
    a: Path, b: Path, basis: Path | None = None, report: Report = lambda *_: None
) -> Difference:
    """Compare two things of one kind.

    Raises InputError for two kinds, or one that is not compared; BasisMismatchError for adapters
    of different bases; and what reading them raises.
    """
    kinds = kind_of(str(a)), kind_of(str(b))
    if kinds[0] != kinds[1]:
        raise InputError(f"found a {kinds[0]} ({a}) and a {kinds[1]} ({b}), expected two of a kind")
    if kinds[0] not in ("adapter", "basis", "model"):
        raise InputError(f"{a}: found a {kinds[0]}, expected an adapter, a basis or a model folder")
    if kinds[0] == "adapter":
        return diff_adapters(a, b, basis)
    if basis is not None:
        raise InputError(f"--basis: found it for a {kinds[0]}, expected two adapters")
    return diff_bases(a, b) if kinds[0] == "basis" else diff_models(a, b, report)

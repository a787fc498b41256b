"""What a merged checkpoint or a blend records about where it came from."""

from collections.abc import Sequence
from typing import Any

import lorasb_runtime
from lorasb_runtime.merging import MergeMethod
from lorasb_runtime.merging.combine import arrange, find_version
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.tensor_file import dump_json
from lorasb_runtime.types import BaseModelId


def describe_merge(
    base_model: BaseModelId, basis: Basis, adapters: Sequence[WeightedAdapter], method: MergeMethod
) -> dict[str, str]:
    """Metadata for each merged shard; the order of the adapters changes it for ordered methods."""
    return {
        "base_model": dump_json(base_model.as_json()),
        "basis": basis.digest,
        "adapters": dump_json(describe_adapters(arrange(adapters, method))),
        "method": method.name,
        "options": dump_json(dict(method.options)),
        "version": lorasb_runtime.__version__,
    }


def describe_method(method: MergeMethod) -> dict[str, Any]:
    """A method's name and all its options, the defaults included."""
    return {"method": method.name, "options": dict(method.options)}


def describe_adapters(arranged: Sequence[WeightedAdapter]) -> list[dict[str, Any]]:
    """Name, version and weight of each adapter, in the order in which the method took them."""
    return [
        {
            "name": item.adapter.name,
            "version": find_version(item.adapter),
            "weight": item.weight,
        }
        for item in arranged
    ]

"""What a merged checkpoint or a blend records about where it came from."""

from collections.abc import Sequence
from typing import Any

import lorasb_runtime
from lorasb_runtime.merging.combine import in_digest_order
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.tensor_file import dump_json
from lorasb_runtime.types import BaseModelId


def describe_merge(
    base_model: BaseModelId, basis: Basis, adapters: Sequence[WeightedAdapter], method: str
) -> dict[str, str]:
    """Metadata for each merged shard; the order of the adapters does not change it."""
    return {
        "base_model": dump_json(base_model.as_json()),
        "basis": basis.digest,
        "adapters": dump_json(describe_adapters(adapters)),
        "method": method,
        "version": lorasb_runtime.__version__,
    }


def describe_adapters(adapters: Sequence[WeightedAdapter]) -> list[dict[str, Any]]:
    """Name, version and weight of each adapter that was combined, in digest order."""
    return [
        {"name": item.adapter.name, "version": item.adapter.version, "weight": item.weight}
        for item in in_digest_order(adapters)
    ]

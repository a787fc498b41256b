"""A model folder: what it holds, and, where it is a merged one, what was merged into it."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from lorasb_runtime.inspecting.inspection import Inspection
from lorasb_runtime.merging.folder_files import CARD
from lorasb_runtime.merging.record import (
    DTYPES_KEY,
    EARLIER_KEY,
    PREFIX,
    MergeRecord,
    read_card,
    shard_metadata,
)
from lorasb_runtime.storage.checkpoint import Checkpoint, fingerprint, open_checkpoint

OF_ONE_SHARD = (DTYPES_KEY, EARLIER_KEY)  # what differs from one shard to the next
CARD_KEYS = ("base_model", "base_model_relation", "license", "tags")


def inspect_model(path: Path) -> Inspection:
    """A checkpoint folder's facts, provenance and tensors. Raises what `open_checkpoint` raises."""
    checkpoint = open_checkpoint(path)
    notes: list[str] = []
    config = checkpoint.config
    facts: dict[str, Any] = {
        "model_type": config.get("model_type"),
        "fingerprint": fingerprint(checkpoint),
        "bytes": sum(entry.nbytes for entry in checkpoint.tensors.values()),
        "shards": len(checkpoint.shards),
        "tensors_in_all": len(checkpoint.tensors),
        "dtypes": sorted({entry.dtype for entry in checkpoint.tensors.values()}),
        "quantized": config.get("quantization_config") is not None,
        "merged_from": _provenance(checkpoint, notes),
        "model_card": {k: v for k, v in read_card(path / CARD).items() if k in CARD_KEYS} or None,
    }
    return Inspection("model", str(path), facts, tensors=_tensors(checkpoint), notes=tuple(notes))


def _provenance(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any] | None:
    """What the first shard says of a merge, None where it says nothing."""
    record = MergeRecord.read(checkpoint)
    if record is None:
        notes.append("nothing in it says that lorasb merged anything into it")
        return None
    for shard in checkpoint.shards:
        for key, value in shard_metadata(checkpoint.folder / shard).items():
            said = record.provenance.get(key.removeprefix(PREFIX))
            if key.startswith(PREFIX) and key not in OF_ONE_SHARD and value != said:
                notes.append(f"warning: {shard} says another {key} than the first shard")
    found = record.as_json()
    if EARLIER_KEY in shard_metadata(checkpoint.folder / checkpoint.shards[0]):
        notes.append("it was merged into a model that had been merged before; the last is shown")
    return found


def _tensors(checkpoint: Checkpoint) -> tuple[dict[str, Any], ...]:
    """One row for all tensors of one name but for its numbers, of one shape and dtype."""
    groups: dict[tuple[str, tuple[int, ...], str], list[int]] = defaultdict(list)
    for name, entry in checkpoint.tensors.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        groups[kind, entry.shape, entry.dtype].append(entry.nbytes)
    return tuple(
        {
            "tensors": kind,
            "count": len(sizes),
            "shape": list(shape),
            "dtype": dtype,
            "bytes": sum(sizes),
        }
        for (kind, shape, dtype), sizes in sorted(groups.items())
    )

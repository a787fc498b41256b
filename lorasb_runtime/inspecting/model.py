"""A model folder: what it holds, and, where it is a merged one, what was merged into it."""

import json
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from lorasb_runtime.inspecting.inspection import Inspection
from lorasb_runtime.storage import tensor_file
from lorasb_runtime.storage.checkpoint import Checkpoint, fingerprint, open_checkpoint

PREFIX = "lorasb."  # of what `lorasb merge` puts into the shards' metadata
OF_ONE_SHARD = ("source_dtypes", "earlier")  # what differs from one shard to the next
CARD = "README.md"
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
        "model_card": _card(path / CARD, notes),
    }
    return Inspection("model", str(path), facts, tensors=_tensors(checkpoint), notes=tuple(notes))


def _provenance(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any] | None:
    """What the shards say of a merge, None where they say nothing."""
    said: dict[str, str] = {}
    for shard in checkpoint.shards:
        header, _ = tensor_file.read_header(checkpoint.folder / shard)
        for key, value in header.get("__metadata__", {}).items():
            name = key.removeprefix(PREFIX)
            if not key.startswith(PREFIX) or name in OF_ONE_SHARD:
                continue
            if said.setdefault(name, value) != value:
                notes.append(f"warning: {shard} says another {key} than the shards before it")
    if not said:
        notes.append("nothing in it says that lorasb merged anything into it")
        return None
    return {key: _parsed(value) for key, value in sorted(said.items())}


def _parsed(text: str) -> Any:
    """JSON where it is an object or a list, else the text as it is."""
    if text.startswith(("{", "[")):
        with suppress(ValueError):
            return json.loads(text)
    return text


def _card(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """What the model card's header says of the model's origin, None where there is no card."""
    if not path.is_file():
        return None
    try:
        data = metadata_load(path) or {}
    except (ValueError, YAMLError) as error:
        notes.append(f"{path.name}: its header is no YAML ({' '.join(str(error).split())[:80]})")
        return {}
    return {key: data[key] for key in CARD_KEYS if key in data}


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

"""Which tensors of two model folders differ, and by how much."""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorasb_runtime.inspecting.difference import Difference
from lorasb_runtime.storage.checkpoint import Checkpoint, open_checkpoint
from lorasb_runtime.types import Report

BLOCK = 1 << 20  # numbers that are compared at once
IGNORED = ("transformers_version", "_name_or_path")  # say who wrote the configuration


def diff_models(a: Path, b: Path, report: Report = lambda *_: None) -> Difference:
    """Tensors by name, however they are sharded; through memory maps, a block at a time.

    rms: of the difference, of a's numbers and their quotient. Raises what `open_checkpoint` raises.
    """
    one, other = open_checkpoint(a), open_checkpoint(b)
    shared = [name for name in one.tensors if name in other.tensors]
    rows, unlike = [], []
    with _Tensors(one) as mine, _Tensors(other) as theirs:
        for done, name in enumerate(shared, 1):
            if one.tensors[name].shape != other.tensors[name].shape:
                unlike.append(name)
            else:
                row = _compare(name, mine.get(name), theirs.get(name))
                rows += [row] if row["changed"] else []
            report("compare", done, len(shared), name)
    rows.sort(key=lambda row: -row["ratio"])
    configs = {key for key in one.config.keys() | other.config.keys() if key not in IGNORED}
    facts: dict[str, Any] = {
        "same_tensors": len(shared) - len(rows) - len(unlike),
        "changed_tensors": len(rows),
        "of_other_shape": unlike,
        "of_other_dtype": [n for n in shared if one.tensors[n].dtype != other.tensors[n].dtype],
        "only_in_a": sorted(one.tensors.keys() - other.tensors.keys()),
        "only_in_b": sorted(other.tensors.keys() - one.tensors.keys()),
        "config": sorted(k for k in configs if one.config.get(k) != other.config.get(k)),
    }
    return Difference("model", facts, tuple(rows))


class _Tensors:
    """The tensors of a checkpoint by name, mapped into memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stack = ExitStack()

    def __enter__(self) -> "_Tensors":
        folder = self._checkpoint.folder
        self._files = {
            shard: self._stack.enter_context(safe_open(folder / shard, "pt"))
            for shard in self._checkpoint.shards
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[self._checkpoint.tensors[name].file].get_tensor(name)
        return tensor


def _compare(name: str, one: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """Sums in float64. Numbers that are equal count as unchanged whatever their dtypes."""
    changed, apart, whole, largest = 0, 0.0, 0.0, 0.0
    flat = (one.reshape(-1), other.reshape(-1))
    for x, y in zip(*(tensor.split(BLOCK) for tensor in flat), strict=True):
        if x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            whole += x.double().square().sum().item()
            continue
        before = x.double()
        difference = y.double() - before
        changed += int((difference != 0).sum())
        apart += difference.square().sum().item()
        whole += before.square().sum().item()
        largest = max(largest, difference.abs().max().item())
    count = max(1, one.numel())
    return {
        "tensor": name,
        "ratio": math.sqrt(apart / whole) if whole else (math.inf if apart else 0.0),
        "rms_difference": math.sqrt(apart / count),
        "rms_a": math.sqrt(whole / count),
        "largest": largest,
        "changed": changed / count,
    }

"""A merged folder's files beside its shards, and whether the folder may be written at all."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.errors import ConflictError, TooLargeError
from lorasb_runtime.merging.plan import ShardPlan
from lorasb_runtime.storage.checkpoint import INDEX, Checkpoint

REPORT = "lorasb_merge.json"
UNDO = "lorasb_undo.zip"
CARD = "README.md"
BASE_CARD = "BASE_README.md"
CONFIG = "config.json"
# Small files that do not keep their names. The config comes last and makes a folder a model; the
# base model's card speaks of another one.
TO_MERGED = {CONFIG: None, CARD: BASE_CARD}
TO_BASE = {CONFIG: None, CARD: None, BASE_CARD: CARD}

# What a merged folder must not take along: an adapter that loaders would apply once more, weights
# that were not merged, and what an earlier merge says of itself.
LEFT_OUT = (
    *("adapter_config.json", "reconstr_config.json", REPORT, UNDO),
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack"),
    *("*.pkl", "*.pickle", "*.ot", "*.onnx", "*.onnx_data", "*.gguf"),
)
DTYPE_KEYS = ("dtype", "torch_dtype")


def check_output(source: Path, output: Path, nbytes: int, *, force: bool) -> None:
    """Raise unless `output` may take the merged model, `nbytes` of tensors and the small files.

    ConflictError: it is, holds or lies in the source; or `force` would replace what is no model
    folder. TooLargeError: the disk has no room.
    """
    target, origin = output.resolve(), source.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise ConflictError(f"{output}: found the model's own folder, expected one beside it")
    if force and output.exists() and not _may_replace(output):
        raise ConflictError(
            f"{output}: found something other than a model folder, expected one to replace"
        )
    needed = nbytes + sum(path.stat().st_size for path in _small_files(source))
    existing = next(p for p in (target, *target.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TooLargeError(f"{output}: found {free:,} bytes of free disk, expected {needed:,}")


def _may_replace(output: Path) -> bool:
    return output.is_dir() and ((output / CONFIG).is_file() or not any(output.iterdir()))


def copy_small_files(source: Path, folder: Path, renamed: Mapping[str, str | None]) -> None:
    """Copy everything but weights and hidden files, subfolders (chat templates) included.

    `renamed` has other names for some files, None for those that are left out.
    """
    for path in _small_files(source):
        name = str(path.relative_to(source))
        new = renamed.get(name, name)
        if new is not None:
            copy = folder / new
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _small_files(source: Path) -> Iterator[Path]:
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if path.is_file() and not hidden and not any(path.match(p) for p in LEFT_OUT):
            yield path


def write_index(source: Checkpoint, plans: Sequence[ShardPlan], folder: Path) -> None:
    """The source's index, where it has one, with the tensors and the total size of the shards."""
    if not (source.folder / INDEX).is_file():
        return
    index = json.loads((source.folder / INDEX).read_text(encoding="utf-8"))
    homes = {name: plan.file for plan in plans for name in plan.layout}
    known = {name: homes.pop(name) for name in index["weight_map"] if name in homes}
    total = sum(spec.nbytes for plan in plans for spec in plan.layout.values())
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    index["weight_map"] = {**known, **homes}
    write_json(folder / INDEX, index)


def new_config(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """`config`, and with a dtype its own and that of configs inside it set to `dtype`."""
    if dtype is None:
        return config
    name = str(dtype).removeprefix("torch.")
    config = _with_dtype(config, name)
    return config if any(key in config for key in DTYPE_KEYS) else {**config, "dtype": name}


def write_config(source: Checkpoint, config: dict[str, Any], folder: Path) -> None:
    """Where it is the source's, the file is copied as it is."""
    if config == source.config:
        shutil.copyfile(source.folder / CONFIG, folder / CONFIG)
    else:
        write_json(folder / CONFIG, config)


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    changed = {key: name for key in DTYPE_KEYS if key in config}
    nested = {k: _with_dtype(v, name) for k, v in config.items() if isinstance(v, dict)}
    return {**config, **nested, **changed}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

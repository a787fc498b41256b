"""Hugging Face checkpoint folders: which file holds which tensor, and the model's fingerprint.

Reads safetensors only; a folder of pickled weights is refused.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasb_runtime.errors import FileFormatError, NotFoundError
from lorasb_runtime.storage import tensor_file
from lorasb_runtime.storage.json_file import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Config entries that say who wrote the file, not what the model computes.
VOLATILE_CONFIG = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
SAMPLE_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `offset` counts from the file's start; dtype as safetensors names."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def part(self, index: int) -> "TensorEntry":
        """One of the matrices that a stacked tensor consists of."""
        nbytes = self.nbytes // self.shape[0]
        offset = self.offset + index * nbytes
        return TensorEntry(self.file, self.dtype, self.shape[1:], offset, nbytes)


@dataclass(frozen=True)
class WeightPlace:
    """The tensor that holds a module's weight, and which of its matrices where it is a stack."""

    name: str
    expert: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its config, its shards in order and every tensor's place."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    tensors: dict[str, TensorEntry]

    def weight_name(self, module: str) -> str:
        """The name of the tensor in which `find_weight` finds the module's weight."""
        return self.find_weight(module).name

    def find_weight(self, module: str) -> WeightPlace:
        """Where `module`'s weight lies.

        A checkpoint may leave out the model class' own prefix (`h.0...` for `transformer.h.0...`).
        Where it stacks the experts of a layer in one tensor `...experts.gate_up_proj` [experts,
        ...], the module is named with the expert's number: `...experts.3.gate_up_proj`.
        Raises NotFoundError where there is none, as for a tied output embedding.
        """
        for name in _spellings(module):
            if name in self.tensors:
                return WeightPlace(name)
        parts = module.split(".")
        for at in reversed([i for i, part in enumerate(parts) if part.isdecimal()]):
            stack = ".".join(parts[:at] + parts[at + 1 :])
            for name in (stack, *_spellings(stack)):
                shape = self.tensors[name].shape if name in self.tensors else ()
                if len(shape) == 3 and int(parts[at]) < shape[0]:
                    return WeightPlace(name, int(parts[at]))
        raise NotFoundError(
            f"{self.folder}: found no tensor for module {module}, expected {module}.weight"
        )

    def weight_entry(self, module: str) -> TensorEntry:
        """The module's weight itself, of two dimensions in a stack too."""
        place = self.find_weight(module)
        entry = self.tensors[place.name]
        return entry if place.expert is None else entry.part(place.expert)


def _spellings(module: str) -> tuple[str, ...]:
    return (f"{module}.weight", f"{module.partition('.')[2]}.weight")


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config, index and shard headers (no weights). Raises NotFoundError, FileFormatError."""
    folder = Path(folder)
    config = read_json_object(folder / "config.json", "a model folder with it")
    shards = _shard_names(folder)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        header, start = tensor_file.read_header(folder / shard)
        size = (folder / shard).stat().st_size
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                begin, end = entry["data_offsets"]
                dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
                whole = 0 <= begin <= end and start + end <= size
            except (KeyError, TypeError, ValueError):
                raise FileFormatError(
                    str(folder / shard), f"{name} with {entry!r:.80}", "dtype, shape and offsets"
                ) from None
            if not whole:
                raise FileFormatError(
                    str(folder / shard), "a file cut short", f"all the bytes of {name}"
                )
            tensors[name] = TensorEntry(shard, dtype, shape, start + begin, end - begin)
    return Checkpoint(folder, config, shards, tensors)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Digest that identifies the base model, the same however the weights are sharded.

    Covers the config, every tensor's name, shape and dtype, and three sampled blocks of its bytes
    (start, middle, end), so that a 70B checkpoint takes about a second.
    """
    sha = hashlib.sha256()
    config = {k: v for k, v in checkpoint.config.items() if k not in VOLATILE_CONFIG}
    sha.update(json.dumps(config, sort_keys=True).encode())
    files = {shard: (checkpoint.folder / shard).open("rb") for shard in checkpoint.shards}
    try:
        for name in sorted(checkpoint.tensors):
            entry = checkpoint.tensors[name]
            sha.update(f"|{name}|{entry.dtype}|{list(entry.shape)}|".encode())
            last = max(0, entry.nbytes - SAMPLE_BLOCK_BYTES)
            for start in (0, last // 2, last):
                files[entry.file].seek(entry.offset + start)
                sha.update(files[entry.file].read(min(SAMPLE_BLOCK_BYTES, entry.nbytes)))
    finally:
        for file in files.values():
            file.close()
    return f"sha256:{sha.hexdigest()}"


def _shard_names(folder: Path) -> tuple[str, ...]:
    if (folder / INDEX).is_file():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FileFormatError(str(folder / INDEX), "no weight_map", "tensor names and files")
        shards = tuple(sorted({str(shard) for shard in weight_map.values()}))
        for shard in shards:
            if (
                not isinstance(shard, str)
                or Path(shard).name != shard
                or not (folder / shard).is_file()
            ):
                raise FileFormatError(str(folder), f"no shard {shard!r}", "each file of the index")
        return shards
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    raise FileFormatError(str(folder), f"neither {SINGLE} nor {INDEX}", "safetensors weights")

"""Merging into a Hugging Face checkpoint on disk, shard by shard and tensor by tensor."""

import json
import mmap
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasb_runtime.errors import ConflictError, InputError, TooLargeError
from lorasb_runtime.merging.fold import Survival, fold_weight, target_delta
from lorasb_runtime.storage import atomic, shard_writer, tensor_file
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import INDEX, Checkpoint, TensorEntry
from lorasb_runtime.storage.shard_writer import DTYPES, NAMES

Report = Callable[[str, int, int, str], None]  # phase, done, total, note

# What a merged folder must not take along: adapters that would be applied again, other weights.
LEFT_OUT = ("adapter_config.json", "adapter_model.*", "*.safetensors", "*.index.json")
LEFT_OUT_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class MergeReport:
    """What became of each module's delta, by module name."""

    modules: dict[str, Survival]

    @property
    def total(self) -> Survival:
        return sum(self.modules.values(), Survival())


def merge_checkpoint(
    source: Checkpoint,
    basis: Basis,
    scaled_cores: torch.Tensor,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    provenance: dict[str, str],
    force: bool = False,
    report: Report = lambda *_: None,
) -> MergeReport:
    """Write `source` with the adapter folded in to the folder `output`, whole or not at all.

    scaled_cores: [D], from `scale_core`. dtype None keeps each tensor's own; otherwise every
    floating-point tensor is written in it. `provenance` goes into each shard's metadata under
    `lorasb.` keys. Sharding, index, config, tokenizer and other small files are kept.
    Raises InputError for what cannot be merged, ConflictError for an output that is in the way.
    """
    targets = _target_tensors(source, basis)
    _check_output(source, output, dtype)
    merge = _ShardMerge(source, basis, scaled_cores, targets, dtype)
    with atomic.new_folder(output, force=force) as folder:
        _copy_small_files(source.folder, folder)
        for done, shard in enumerate(source.shards):
            report("merge", done, len(source.shards), shard)
            merge.write(shard, folder, provenance)
        report("merge", len(source.shards), len(source.shards), "")
        _write_index(source, folder)
        if dtype is not None:
            _write_config(source, folder, dtype)
    return MergeReport(merge.modules)


class _ShardMerge:
    """Merges one shard after the other, reading through a memory map."""

    def __init__(
        self,
        source: Checkpoint,
        basis: Basis,
        scaled_cores: torch.Tensor,
        targets: dict[str, int],
        dtype: torch.dtype | None,
    ) -> None:
        self.modules: dict[str, Survival] = {}
        self._source = source
        self._basis = basis
        self._cores = scaled_cores
        self._targets = targets
        self._dtype = dtype

    def write(self, shard: str, folder: Path, provenance: dict[str, str]) -> None:
        path = self._source.folder / shard
        header, _ = tensor_file.read_header(path)
        metadata = dict(header.get("__metadata__", {"format": "pt"}))
        metadata.update({f"lorasb.{key}": value for key, value in provenance.items()})
        entries = {n: e for n, e in self._source.tensors.items() if e.file == shard}
        entries = dict(sorted(entries.items(), key=lambda item: item[1].offset))
        layout = {name: self._layout(entry) for name, entry in entries.items()}
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        contents = self._contents(entries, memoryview(mapped))
        shard_writer.write_shard(folder / shard, layout, metadata, contents)

    def _out_dtype(self, entry: TensorEntry) -> torch.dtype | None:
        """The dtype to write a floating-point tensor in; None for other tensors."""
        own = DTYPES.get(entry.dtype)
        return own if own is None or self._dtype is None else self._dtype

    def _layout(self, entry: TensorEntry) -> tuple[str, tuple[int, ...], int]:
        dtype = self._out_dtype(entry)
        if dtype is None:
            return entry.dtype, entry.shape, entry.nbytes
        count = entry.nbytes // shard_writer.element_bytes(entry.dtype)
        return NAMES[dtype], entry.shape, count * dtype.itemsize

    def _contents(self, entries: dict[str, TensorEntry], view: memoryview) -> Iterator[memoryview]:
        for name, entry in entries.items():
            data = view[entry.offset : entry.offset + entry.nbytes]
            dtype = self._out_dtype(entry)
            if name not in self._targets and (dtype is None or NAMES[dtype] == entry.dtype):
                yield data
                continue
            assert dtype is not None
            weight = torch.frombuffer(bytearray(data), dtype=DTYPES[entry.dtype])
            weight = weight.view(entry.shape)
            if name in self._targets:
                weight = self._folded(self._targets[name], weight, dtype)
            yield shard_writer.tensor_bytes(weight.to(dtype))

    def _folded(self, index: int, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        target = self._basis.targets[index]
        delta = target_delta(self._basis, index, self._cores)
        delta = delta.t() if target.transposed else delta
        folded, self.modules[target.module] = fold_weight(weight, delta, dtype)
        return folded


def _target_tensors(source: Checkpoint, basis: Basis) -> dict[str, int]:
    """From tensor name to target index; refuses weights that a delta cannot be added to."""
    if "quantization_config" in source.config:
        raise InputError(
            f"{source.folder}: found a quantized checkpoint, expected plain weights; "
            "dequantize it first"
        )
    targets = {}
    for index, target in enumerate(basis.targets):
        name = source.weight_name(target.module)
        dtype = source.tensors[name].dtype
        if dtype not in DTYPES:
            raise InputError(f"{name}: found dtype {dtype}, expected one of {', '.join(DTYPES)}")
        targets[name] = index
    return targets


def _check_output(source: Checkpoint, output: Path, dtype: torch.dtype | None) -> None:
    inside = output.resolve()
    folder = source.folder.resolve()
    if inside == folder or folder in inside.parents or inside in folder.parents:
        raise ConflictError(f"{output}: found the model's own folder, expected one beside it")
    needed = sum(
        entry.nbytes // shard_writer.element_bytes(entry.dtype) * dtype.itemsize
        if dtype is not None and entry.dtype in DTYPES
        else entry.nbytes
        for entry in source.tensors.values()
    )
    existing = next(p for p in (inside, *inside.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TooLargeError(f"{output}: found {free:,} bytes of disk free, expected {needed:,}")


def _copy_small_files(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        kept = not any(path.match(p) for p in (*LEFT_OUT, *LEFT_OUT_PICKLES))
        if path.is_file() and kept:
            shutil.copyfile(path, folder / path.name)


def _write_index(source: Checkpoint, folder: Path) -> None:
    """The index with the same weight map; its total size follows the output's dtype."""
    if not (source.folder / INDEX).is_file():
        return
    index = json.loads((source.folder / INDEX).read_text(encoding="utf-8"))
    total = 0
    for shard in source.shards:
        header, start = tensor_file.read_header(folder / shard)
        total += (folder / shard).stat().st_size - start
    index.setdefault("metadata", {})["total_size"] = total
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(source: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    config = dict(source.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

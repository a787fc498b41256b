"""Merging into a Hugging Face checkpoint on disk, shard by shard and tensor by tensor."""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.delta import DeltaOf
from lorasb_runtime.merging.fold import Survival, adding_dtype, fold_weight
from lorasb_runtime.merging.source import check_shards, target_tensors
from lorasb_runtime.storage import atomic, shard_writer, tensor_file
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import Checkpoint, TensorEntry
from lorasb_runtime.storage.match import check_model
from lorasb_runtime.storage.shard_writer import DTYPES, TensorSpec

Report = Callable[[str, int, int, str], None]  # phase, done, total, note


@dataclass(frozen=True)
class MergeReport:
    """What became of each target's delta, by module name in the basis' order."""

    modules: dict[str, Survival]

    @property
    def total(self) -> Survival:
        return sum(self.modules.values(), Survival())

    @property
    def least_kept(self) -> str:
        """The module that lost the largest share of its delta."""
        return min(self.modules, key=lambda name: self.modules[name].kept)


def merge_checkpoint(
    source: Checkpoint,
    basis: Basis,
    deltas: DeltaOf,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    provenance: dict[str, str],
    force: bool = False,
    report: Report = lambda *_: None,
) -> MergeReport:
    """Write `source` with the targets' deltas added to the folder `output`, whole or not at all.

    dtype None keeps each tensor's own; otherwise every
    floating-point tensor is written in it. `provenance` goes into each shard's metadata under
    `lorasb.` keys. Sharding, index, config, tokenizer and other small files are kept.

    Raises BasisMismatchError for a basis of another model, FileFormatError for a damaged source,
    InputError for weights that no delta can be added to, ConflictError for an output that is in
    the way, TooLargeError for a disk too full.
    """
    check_model(basis, source, "basis")
    check_shards(source)
    targets = target_tensors(source, basis)
    merge = _ShardMerge(source, basis, deltas, targets, dtype, report)
    folder_files.check_output(source.folder, output, merge.nbytes, force=force)
    with atomic.new_folder(output, force=force) as folder:
        folder_files.copy_small_files(source.folder, folder)
        for shard in source.shards:
            merge.write(shard, folder, {f"lorasb.{key}": v for key, v in provenance.items()})
        folder_files.write_index(source, folder)
        if dtype is not None:
            folder_files.write_config(source, folder, dtype)
    return MergeReport({t.module: merge.modules[t.module] for t in basis.targets})


class _ShardMerge:
    """Merges one shard after the other, reading through memory maps."""

    def __init__(
        self,
        source: Checkpoint,
        basis: Basis,
        deltas: DeltaOf,
        targets: dict[str, int],
        dtype: torch.dtype | None,
        report: Report,
    ) -> None:
        self.modules: dict[str, Survival] = {}
        self._source = source
        self._basis = basis
        self._deltas = deltas
        self._targets = targets
        self._dtype = dtype
        self._report = report
        self._done = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors as they will be written."""
        return sum(self._spec(entry).nbytes for entry in self._source.tensors.values())

    def write(self, shard: str, folder: Path, provenance: dict[str, str]) -> None:
        """Write the merged `shard` into `folder`, its tensors in the source's order."""
        path = self._source.folder / shard
        header, _ = tensor_file.read_header(path)
        metadata = {**header.get("__metadata__", {"format": "pt"}), **provenance}
        found = ((n, e) for n, e in self._source.tensors.items() if e.file == shard)
        entries = dict(sorted(found, key=lambda item: item[1].offset))
        if self._dtype is not None:  # wide elements first, so that each stays aligned to its size
            entries = dict(sorted(entries.items(), key=lambda item: -self._element_bytes(item[1])))
        layout = {name: self._spec(entry) for name, entry in entries.items()}
        contents = self._contents(path, entries)
        shard_writer.write_shard(folder / shard, layout, metadata, contents)

    def _spec(self, entry: TensorEntry) -> TensorSpec:
        spec = TensorSpec(entry.dtype, entry.shape, entry.nbytes)
        return spec.cast(self._dtype) if self._dtype and entry.dtype in DTYPES else spec

    def _element_bytes(self, entry: TensorEntry) -> int:
        """Of the output; 8 for an empty tensor, which is aligned wherever it lies."""
        spec = self._spec(entry)
        count = torch.Size(spec.shape).numel()
        return spec.nbytes // count if count else 8

    def _contents(self, path: Path, entries: dict[str, TensorEntry]) -> Iterator[memoryview]:
        """Each tensor's bytes as they will be written; those that do not change come as a view."""
        with safe_open(path, "pt") as tensors, path.open("rb") as file:
            raw = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            for name, entry in entries.items():
                self._report("merge", self._done, len(self._source.tensors), name)
                dtype = self._spec(entry).dtype
                if name in self._targets:
                    folded = self._fold(self._targets[name], tensors.get_tensor(name), dtype)
                    yield shard_writer.tensor_bytes(folded)
                elif dtype != entry.dtype:
                    yield shard_writer.tensor_bytes(tensors.get_tensor(name).to(DTYPES[dtype]))
                else:
                    yield raw[entry.offset : entry.offset + entry.nbytes]
                self._done += 1
                self._report("merge", self._done, len(self._source.tensors), "")

    def _fold(self, index: int, weight: torch.Tensor, dtype: str) -> torch.Tensor:
        """The merged weight, [out, in] or as the checkpoint stores it."""
        target = self._basis.targets[index]
        out = torch.empty(weight.shape, dtype=DTYPES[dtype])
        delta = self._deltas(index, adding_dtype(weight.dtype))
        if target.transposed:
            survival = fold_weight(weight.t(), delta, out.t(), target.module)
        else:
            survival = fold_weight(weight, delta, out, target.module)
        self.modules[target.module] = survival
        return out

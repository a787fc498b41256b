"""The undo file of a merged model: what turns its bytes back into the source's, all of them.

A zip archive of: `undo.json` (format, format_version, sha256 of each source shard by name);
`headers/<shard>`, the shard's header; `files/<name>`, small files as they were; `tensors/<name>`,
for each tensor whose bytes are not those of the merged one in the source's dtype: the differences
of the bit patterns as integers, zigzag, in blocks of BLOCK_NUMBERS, the lowest bytes of a block
first. Where a weight moved by few steps of its dtype these are small, and deflate to little.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorasb_runtime.errors import FileFormatError
from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.plan import ShardPlan
from lorasb_runtime.storage import tensor_file
from lorasb_runtime.storage.checkpoint import INDEX, Checkpoint, TensorEntry
from lorasb_runtime.storage.mapped_shard import MappedShard
from lorasb_runtime.storage.shard_writer import DTYPES, tensor_bytes
from lorasb_runtime.types import Report

FORMAT = "lorasb-undo"
FORMAT_VERSION = "1"
BLOCK_NUMBERS = 1 << 20
SMALL_FILES = (folder_files.CONFIG, folder_files.CARD, folder_files.BASE_CARD, INDEX)
DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, RuntimeError)

Bits = np.ndarray[Any, np.dtype[Any]]


class BitTensors:
    """A checkpoint's tensors as blocks of bit patterns."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps = {file: MappedShard(checkpoint.folder / file) for file in checkpoint.shards}

    def blocks(self, entry: TensorEntry) -> Iterator[Bits]:
        """Unsigned integers as wide as the tensor's numbers."""
        raw = np.frombuffer(self._maps[entry.file].raw(entry), np.uint8)
        width = _width(entry)
        for start in range(0, len(raw), width * BLOCK_NUMBERS):
            yield raw[start : start + width * BLOCK_NUMBERS].view(f"u{width}")

    def predictions(self, name: str, wanted: TensorEntry) -> Iterator[Bits]:
        """What the tensor's bits are likely to be where `wanted` describes it: as in this model.

        Zeros where it has no such tensor.
        """
        found = self._checkpoint.tensors.get(name)
        if found is None or found.shape != wanted.shape:
            yield from _zeros(wanted)
        elif found.dtype == wanted.dtype:
            yield from self.blocks(found)
        elif found.dtype in DTYPES and wanted.dtype in DTYPES:
            for block in self.blocks(found):
                numbers = torch.from_numpy(block.copy().view(f"i{_width(found)}"))
                cast = numbers.view(DTYPES[found.dtype]).to(DTYPES[wanted.dtype])
                yield np.frombuffer(tensor_bytes(cast), f"u{_width(wanted)}")
        else:
            yield from _zeros(wanted)


def most_undo_bytes(source: Checkpoint, plans: Sequence[ShardPlan]) -> int:
    """The most that an undo file takes: all of the tensors that do not come out as copies."""
    copied = {piece.name for plan in plans for piece in plan.pieces if piece.copied}
    folded = {piece.name for plan in plans for piece in plan.pieces if not piece.copied}
    tensors = sum(e.nbytes for n, e in source.tensors.items() if n in folded or n not in copied)
    headers = sum(tensor_file.read_header(source.folder / shard)[1] for shard in source.shards)
    return tensors + tensors // 1000 + headers + (1 << 20)


def write_undo(source: Checkpoint, merged: Checkpoint, path: Path, report: Report) -> None:
    """Write the undo file of `merged`, which was made from `source`."""
    total, done = sum(entry.nbytes for entry in source.tensors.values()), 0
    before, after = BitTensors(source), BitTensors(merged)
    digests = {shard: _digest(source.folder / shard) for shard in source.shards}
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "shards": digests}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("undo.json", json.dumps(about))
        for name in SMALL_FILES:
            if (source.folder / name).is_file():
                archive.write(source.folder / name, f"files/{name}")
        for shard in source.shards:
            _, start = tensor_file.read_header(source.folder / shard)
            with (source.folder / shard).open("rb") as file:
                archive.writestr(f"headers/{shard}", file.read(start))
        for name, entry in source.tensors.items():
            if _differs(before.blocks(entry), after.predictions(name, entry)):
                with archive.open(f"tensors/{name}", "w", force_zip64=True) as out:
                    pairs = zip(before.blocks(entry), after.predictions(name, entry), strict=True)
                    for old, new in pairs:
                        out.write(_pack(old - new))
            done += entry.nbytes
            report("undo file", done, total, name)


def _differs(before: Iterator[Bits], after: Iterator[Bits]) -> bool:
    return any(not np.array_equal(old, new) for old, new in zip(before, after, strict=True))


class UndoFile:
    """Reads an undo file. Raises FileFormatError for one that is not whole, or of another kind."""

    def __init__(self, path: Path) -> None:
        self._source = str(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise self._refuse(f"damage ({error})") from None
        try:
            about = json.loads(self._read("undo.json"))
        except ValueError:
            about = None
        if not isinstance(about, dict):
            raise self._refuse("undo.json that is no JSON object")
        meta = tensor_file.Metadata(self._source, about)
        meta.expect("format", FORMAT)
        meta.expect("format_version", FORMAT_VERSION)
        shards = about.get("shards")
        if not isinstance(shards, dict) or not all(
            Path(name).name == name and name.endswith(".safetensors") and isinstance(digest, str)
            for name, digest in shards.items()
        ):
            raise self._refuse("shards of another kind")
        self.digests: dict[str, str] = shards
        self.names = set(self._archive.namelist())

    def header(self, shard: str) -> bytes:
        return self._read(f"headers/{shard}")

    def small_file(self, name: str) -> bytes | None:
        """A small file as it was; None where there was none."""
        return self._read(f"files/{name}") if f"files/{name}" in self.names else None

    def blocks(self, name: str, entry: TensorEntry, predicted: Iterator[Bits]) -> Iterator[Bits]:
        """The source's bits of a tensor, from those predicted for it."""
        if f"tensors/{name}" not in self.names:
            yield from predicted
            return
        try:
            with self._archive.open(f"tensors/{name}") as file:
                for bits in predicted:
                    yield bits + _unpack(file.read(bits.nbytes), _width(entry))
        except DAMAGE as error:
            raise self._refuse(f"damage in {name} ({error})") from None

    def _read(self, name: str) -> bytes:
        try:
            if self._archive.getinfo(name).file_size > tensor_file.MAX_HEADER_BYTES:
                raise ValueError("it is too large")
            return self._archive.read(name)
        except DAMAGE as error:
            raise self._refuse(f"damage in {name} ({error})") from None

    def _refuse(self, found: str) -> FileFormatError:
        return FileFormatError(self._source, found, "a whole undo file")


def _pack(difference: Bits) -> bytes:
    """Zigzag, so that small differences of either sign are small; then byte by byte of all."""
    width = difference.dtype.itemsize
    signed = difference.view(f"i{width}")
    zigzag = (difference << 1) ^ (signed >> (8 * width - 1)).view(difference.dtype)
    return zigzag.view(np.uint8).reshape(-1, width).T.tobytes()


def _unpack(data: bytes, width: int) -> Bits:
    planes = np.frombuffer(data, np.uint8).reshape(width, -1)
    zigzag = np.ascontiguousarray(planes.T).view(f"u{width}").reshape(-1)
    return (zigzag >> 1) ^ (~(zigzag & 1) + 1)


def _width(entry: TensorEntry) -> int:
    """Bytes of one number; 1 where they are not whole bytes, or none."""
    count = torch.Size(entry.shape).numel()
    width = entry.nbytes // count if count else 1
    return width if width in (1, 2, 4, 8) and width * count == entry.nbytes else 1


def _zeros(entry: TensorEntry) -> Iterator[Bits]:
    width = _width(entry)
    count = entry.nbytes // width
    for start in range(0, count, BLOCK_NUMBERS):
        yield np.zeros(min(BLOCK_NUMBERS, count - start), f"u{width}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

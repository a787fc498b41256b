"""A merged model's source, byte by byte, by means of the undo file in its folder."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from lorasb_runtime.errors import FileFormatError
from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.undo import SMALL_FILES, BitTensors, UndoFile
from lorasb_runtime.storage import atomic
from lorasb_runtime.storage.checkpoint import Checkpoint, TensorEntry
from lorasb_runtime.types import Report


def undo_merge(
    merged: Checkpoint, output: Path, *, force: bool = False, report: Report = lambda *_: None
) -> tuple[str, ...]:
    """Write the model that `merged` was made from to the folder `output`; returns its shards.

    Each shard has the digest that the undo file recorded, or nothing is written. Raises
    FileFormatError for a damaged undo file, or a merged model that was changed since;
    ConflictError for an output that is in the way, TooLargeError for a disk too full.
    """
    undo = UndoFile(merged.folder / folder_files.UNDO)
    headers = {shard: undo.header(shard) for shard in undo.digests}
    shards = {shard: _entries(shard, headers[shard], merged.folder) for shard in headers}
    total = sum(entry.nbytes for entries in shards.values() for entry in entries.values())
    folder_files.check_output(merged.folder, output, total, force=force)
    tensors = BitTensors(merged)
    done = 0
    with atomic.new_folder(output, force=force) as folder:
        folder_files.copy_small_files(merged.folder, folder, folder_files.TO_BASE)
        for shard, entries in shards.items():
            digest = hashlib.sha256(headers[shard])
            with (folder / shard).open("wb") as file:
                file.write(headers[shard])
                for name, entry in entries.items():
                    for bits in undo.blocks(name, entry, tensors.predictions(name, entry)):
                        file.write(bits.data)
                        digest.update(bits.data)
                        done += bits.nbytes
                        report("unmerge", done, total, name)
            if digest.hexdigest() != undo.digests[shard]:
                raise FileFormatError(
                    str(merged.folder),
                    f"weights that {folder_files.UNDO} does not turn into {shard}",
                    "the merged model as it was written",
                )
        for name in sorted(SMALL_FILES, key=lambda name: name == folder_files.CONFIG):
            data = undo.small_file(name)
            if data is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(data)
    return tuple(shards)


def _entries(shard: str, header: bytes, folder: Path) -> dict[str, TensorEntry]:
    """A shard's tensors in the order of their bytes, which must lie end to end."""
    source = str(folder / folder_files.UNDO)
    try:
        (length,) = struct.unpack_from("<Q", header)
        parsed: dict[str, Any] = json.loads(header[8:])
        parsed.pop("__metadata__", None)
        entries = {
            name: TensorEntry(
                shard,
                str(entry["dtype"]),
                tuple(int(size) for size in entry["shape"]),
                int(entry["data_offsets"][0]),
                int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in parsed.items()
        }
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise FileFormatError(source, f"a damaged header of {shard}", "a whole one") from None
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = 0
    for entry in ordered.values():
        if entry.offset != end or entry.nbytes < 0:
            raise FileFormatError(source, f"a header of {shard} with gaps", "tensors end to end")
        end += entry.nbytes
    if length != len(header) - 8:
        raise FileFormatError(source, f"a header of {shard} cut short", f"{length} bytes of it")
    return ordered

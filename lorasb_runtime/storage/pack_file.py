"""Pack files: many adapters of one basis in one safetensors file, memory-mapped.

Tensors: `cores` [N, D]; `versions` uint8 [N, 32], the digests; `headers` uint8, all adapter files'
bytes before their cores, end to end; `header_ends` int64 [N], where each of them ends. Metadata:
format, format_version, basis (a digest) and `names`, JSON, sorted. An adapter file's bytes come
back exactly: its header and its row, rounded back where the pack is wider than the file was.
"""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError
from lorasb_runtime.storage import atomic, tensor_file
from lorasb_runtime.storage.adapter_file import Adapter, parse_adapter
from lorasb_runtime.storage.shard_writer import DTYPES, NAMES, tensor_bytes

FORMAT = "lorasb-pack"
FORMAT_VERSION = "1"
DIGEST_BYTES = 32

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# From the place of a name in the list to the adapter file's bytes.
ReadAdapter = Callable[[int], bytes]


class PackFile:
    """Reads adapters out of a pack; memory holds names and versions, the rest stays in the file.

    Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        """Raises FileFormatError for a file that is not a whole pack."""
        self.path = path
        header, start = tensor_file.read_header(path)
        self._check(header, path.stat().st_size - start)
        data: Bytes = np.memmap(path, dtype=np.uint8, mode="r", offset=start)
        n = len(self.names)
        self.size = int(header["cores"]["shape"][1])
        self.dtype: torch.dtype = DTYPES[header["cores"]["dtype"]]

        def part(name: str) -> Bytes:
            begin, end = header[name]["data_offsets"]
            return data[begin:end]

        self._cores = part("cores").reshape(n, self.size * self.dtype.itemsize)
        self._headers = part("headers")
        self._ends: list[int] = np.concatenate([[0], part("header_ends").view(np.int64)]).tolist()
        digests = part("versions").tobytes().hex()
        step = 2 * DIGEST_BYTES
        self.versions = [digests[i * step : (i + 1) * step] for i in range(n)]
        if sorted(self._ends) != self._ends or self._ends[-1] != len(self._headers):
            raise FileFormatError(str(path), "header_ends out of order", "rising offsets")

    def __len__(self) -> int:
        return len(self.names)

    def adapter_bytes(self, index: int, nbytes: int | None = None) -> bytes:
        """The adapter file that lies at `index`, or its first `nbytes` bytes.

        Its digest is the caller's to check.
        """
        header, stored = self._header_of(index)
        count = self.size
        if nbytes is not None:  # so many numbers reach that far
            count = min(count, max(0, -(-(nbytes - len(header)) // stored.itemsize)))
        row = bytearray(self._cores[index, : count * self.dtype.itemsize])
        if stored != self.dtype and row:
            row = bytearray(tensor_bytes(torch.frombuffer(row, dtype=self.dtype).to(stored)))
        return (header + row)[:nbytes]

    def file_bytes(self, index: int) -> int:
        """How many bytes `adapter_bytes` gives."""
        header, stored = self._header_of(index)
        return len(header) + self.size * stored.itemsize

    def _header_of(self, index: int) -> tuple[bytes, torch.dtype]:
        """What comes before an adapter file's cores, and the dtype of these in that file."""
        header = self._headers[self._ends[index] : self._ends[index + 1]].tobytes()
        try:
            return header, DTYPES[json.loads(header[8:])["cores"]["dtype"]]
        except (ValueError, KeyError, TypeError):
            found = f"a damaged header of adapter {self.names[index]!r}"
            raise FileFormatError(str(self.path), found, "an adapter file's header") from None

    def _check(self, header: dict[str, Any], nbytes: int) -> None:
        """The header says what a pack's must, and fits the file."""
        source = str(self.path)
        meta = tensor_file.Metadata(source, header.get("__metadata__", {}))
        meta.expect("format", FORMAT)
        meta.expect("format_version", FORMAT_VERSION)
        self.basis = meta.text("basis")
        self.names: list[str] = meta.json("names")
        if not isinstance(self.names, list) or not all(isinstance(n, str) for n in self.names):
            raise FileFormatError(source, "names of another kind", "a list of names")
        if any(a >= b for a, b in zip(self.names, self.names[1:], strict=False)):
            raise FileFormatError(source, "names out of order", "sorted names, each once")
        n = len(self.names)
        try:
            size = int(header["cores"]["shape"][1])
            dtype = str(header["cores"]["dtype"])
            count = int(header["headers"]["shape"][0])
            wanted = _layout(n, size, dtype, count)
        except (KeyError, TypeError, ValueError, IndexError):
            raise FileFormatError(source, "tensors that are no pack's", "a pack") from None
        found = {name: header[name] for name in header if name != "__metadata__"}
        if found != wanted:
            raise FileFormatError(
                source, f"tensors {found}"[:200], f"those of a pack of {n} adapters"
            )
        end = max(entry["data_offsets"][1] for entry in wanted.values())
        if nbytes != end:
            raise FileFormatError(source, f"{nbytes} bytes of tensors", f"{end}")


def write_pack(
    path: Path, names: Sequence[str], read: ReadAdapter, report: Callable[[int], None]
) -> PackFile:
    """Write adapters into a pack, whole or not at all; rows go to the file as they come.

    names: sorted, each once. The row's dtype is the adapters' own, float32 where they differ.
    Raises InputError without names and BasisMismatchError when adapters have different bases.
    """
    if not names:
        raise InputError("pack: found no adapters, expected at least one")
    first = _read(names, read, 0)
    dtype = first.cores.dtype
    try:
        return _write(path, names, read, report, first, dtype)
    except _MixedDtypesError:
        return _write(path, names, read, report, first, torch.float32)


class _MixedDtypesError(Exception):
    """An adapter's dtype is not the first one's."""


def _write(
    path: Path,
    names: Sequence[str],
    read: ReadAdapter,
    report: Callable[[int], None],
    first: Adapter,
    dtype: torch.dtype,
) -> PackFile:
    with atomic.new_file(path) as file:
        # The length of the headers is known at the end; room for any is left in the JSON text.
        room = len(_header(names, first, dtype, 1 << 60))
        file.write(b" " * room)
        ends, headers, versions = [], bytearray(), bytearray()
        for index, name in enumerate(names):
            data = read(index)
            adapter = parse_adapter(data, f"adapter {name!r}")
            if adapter.basis != first.basis or adapter.cores.numel() != first.cores.numel():
                raise BasisMismatchError(
                    f"adapter {name!r}: found one for basis {adapter.basis}, expected "
                    f"{first.basis}, the basis of {names[0]!r}; a pack has one basis"
                )
            if adapter.cores.dtype != dtype and dtype != torch.float32:
                raise _MixedDtypesError
            file.write(tensor_bytes(adapter.cores.to(dtype)))
            headers += data[: len(data) - adapter.cores.nbytes]
            ends.append(len(headers))
            versions += bytes.fromhex(adapter.version)
            report(index + 1)
        file.write(np.asarray(ends, dtype="<i8").tobytes())
        file.write(versions)
        file.write(headers)
        file.seek(0)
        file.write(_header(names, first, dtype, len(headers)).ljust(room))
        _write_length(file, room)
    return PackFile(path)


def _read(names: Sequence[str], read: ReadAdapter, index: int) -> Adapter:
    return parse_adapter(read(index), f"adapter {names[index]!r}")


def _write_length(file: BinaryIO, room: int) -> None:
    """The JSON text's length in front of it, its padding included."""
    file.seek(0)
    file.write(struct.pack("<Q", room - 8))


def _header(names: Sequence[str], first: Adapter, dtype: torch.dtype, count: int) -> bytes:
    """Eight bytes for the length, and the JSON header padded to a multiple of eight."""
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "basis": first.basis,
        "names": tensor_file.dump_json(list(names)),
    }
    layout = _layout(len(names), first.cores.numel(), NAMES[dtype], count)
    text = tensor_file.dump_json({"__metadata__": metadata, **layout}).encode()
    return b" " * 8 + text + b" " * (-len(text) % 8)


def _layout(n: int, size: int, dtype: str, count: int) -> dict[str, dict[str, Any]]:
    """The tensors' entries in the safetensors header; `count` bytes of adapter headers."""
    parts = (
        ("cores", dtype, [n, size], n * size * DTYPES[dtype].itemsize),
        ("header_ends", "I64", [n], 8 * n),
        ("versions", "U8", [n, DIGEST_BYTES], DIGEST_BYTES * n),
        ("headers", "U8", [count], count),
    )
    layout, offset = {}, 0
    for name, kind, shape, nbytes in parts:
        layout[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    return layout

"""Writes a safetensors shard in parts, so that memory never holds a whole tensor of it."""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

# The plain floating-point dtypes, as safetensors names them.
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
CHUNK_BYTES = 1 << 20  # of one write: others that write to the file come in between


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's place in a shard: its dtype as safetensors names it, shape and byte count."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "TensorSpec":
        """A tensor of this shape in a plain floating-point dtype."""
        return cls(NAMES[dtype], shape, prod(shape) * dtype.itemsize)

    def cast(self, dtype: torch.dtype) -> "TensorSpec":
        """The same tensor in another floating-point dtype."""
        return TensorSpec.of(self.shape, dtype)


def write_tensors(
    file: BinaryIO,
    layout: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    contents: Iterable[memoryview],
) -> None:
    """Write a safetensors file with the tensors of `layout`, in its order.

    `contents` gives each tensor's bytes, in the same order. Raises ValueError when these are not
    as many as announced.
    """
    header = _header(layout, metadata)
    file.write(struct.pack("<Q", len(header)))
    file.write(header)
    for (name, spec), data in zip(layout.items(), contents, strict=True):
        if data.nbytes != spec.nbytes:
            raise ValueError(f"{name}: {data.nbytes} bytes, announced {spec.nbytes}")
        file.write(data)


class NewShard:
    """A safetensors file being written: each tensor's bytes go to their place in any order.

    Several threads may write at once. Whoever writes sees to it that every byte is written: a file
    has its full size from the start, and what is missing would be zeros.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        """Makes the file with the tensors of `layout`, in its order."""
        header = _header(layout, metadata)
        self._starts: dict[str, int] = {}
        end = 8 + len(header)
        for name, spec in layout.items():
            self._starts[name] = end
            end += spec.nbytes
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._write(struct.pack("<Q", len(header)) + header, 0)
        os.truncate(self._file, end)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Put `data` at byte `start` of the tensor `name`."""
        self._write(data.cast("B"), self._starts[name] + start)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        for begin in range(0, len(data), CHUNK_BYTES):
            part = data[begin : begin + CHUNK_BYTES]
            while len(part):
                written = os.pwrite(self._file, part, offset)
                part, offset = part[written:], offset + written

    def sync(self) -> None:
        os.fsync(self._file)

    def __enter__(self) -> "NewShard":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _header(layout: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The JSON header, padded with spaces so that the tensors start 8-byte aligned."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, spec in layout.items():
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data

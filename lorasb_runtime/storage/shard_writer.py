"""Writes one safetensors shard tensor by tensor, so that memory holds one tensor at a time."""

import json
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


def write_shard(
    path: Path,
    layout: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    contents: Iterable[memoryview],
) -> None:
    """Write a safetensors file as `write_tensors` does."""
    with path.open("wb") as file:
        write_tensors(file, layout, metadata, contents)


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

"""Writes one safetensors shard tensor by tensor, so that memory holds one tensor at a time."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def element_bytes(name: str) -> int:
    return DTYPES[name].itemsize


def write_shard(
    path: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...], int]],
    metadata: Mapping[str, str],
    contents: Iterator[memoryview],
) -> None:
    """Write a file whose tensors have the given dtype name, shape and byte count, in this order.

    `contents` gives each tensor's bytes in the order of `layout`. Raises ValueError when they are
    not as many as announced.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, (dtype, shape, nbytes) in layout.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for (name, (_, _, nbytes)), data in zip(layout.items(), contents, strict=True):
            if len(data) != nbytes:
                raise ValueError(f"{name}: {len(data)} bytes, announced {nbytes}")
            file.write(data)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's bytes, without a copy."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())

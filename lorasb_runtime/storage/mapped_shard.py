"""A safetensors shard as a memory map: its tensors are views of the file, read when used."""

import mmap
import warnings
from pathlib import Path

import torch

from lorasb_runtime.errors import FileFormatError
from lorasb_runtime.storage.checkpoint import TensorEntry

# The dtypes that are read here, as safetensors names them.
READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedShard:
    """The map lasts as long as anything that was taken from it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():  # torch says once that a tensor must not be written to
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            torch.frombuffer(self._map, dtype=torch.uint8, count=1)

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor at `entry`, to be read only. Raises FileFormatError for an unknown dtype."""
        if entry.dtype not in READABLE:
            expected = f"one of {', '.join(READABLE)}"
            raise FileFormatError(entry.file, f"dtype {entry.dtype}", expected)
        dtype = READABLE[entry.dtype]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        count = entry.nbytes // dtype.itemsize
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)

    def raw(self, entry: TensorEntry) -> memoryview:
        """The tensor's bytes."""
        return memoryview(self._map)[entry.offset : entry.offset + entry.nbytes]

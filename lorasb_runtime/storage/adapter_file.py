"""Adapter files: one tensor `cores` [D] and who it is for."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorasb_runtime.errors import BasisMismatchError, FileFormatError
from lorasb_runtime.storage import atomic, tensor_file
from lorasb_runtime.storage.basis_file import Basis, parse_base_model
from lorasb_runtime.types import BaseModelId

FORMAT = "lorasb-adapter"
FORMAT_VERSION = "1"
# The bits of the exponent; NaN and Inf are the numbers that have all of them.
EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
DTYPES = tuple(EXPONENTS)
HEADER_ALLOWANCE = 1 << 20  # bytes of an adapter file besides its numbers


@dataclass(frozen=True)
class Adapter:
    """A named point in a basis' core space.

    cores: [D] in bfloat16, float16 or float32: the targets' r x r cores, row by row, in the order
    of the basis. basis: digest of that basis. version: digest of the file's bytes (plain hex),
    empty until the adapter has been a file.
    """

    cores: torch.Tensor
    basis: str
    name: str = ""
    base_model: BaseModelId | None = None
    info: dict[str, Any] = field(default_factory=dict)
    version: str = ""


def load_adapter(path: str | Path, basis: Basis | None = None) -> Adapter:
    """Read an adapter file; with `basis`, also refuse one that is not for it.

    Raises NotFoundError, FileFormatError, BasisMismatchError.
    """
    return parse_adapter(tensor_file.read_file(Path(path)), str(path), basis)


def parse_adapter(
    data: bytes, source: str, basis: Basis | None = None, version: str | None = None
) -> Adapter:
    """An adapter from its file's bytes, checked as `load_adapter` does; `source` names it.

    version: that of `data`, where it has been computed already.
    """
    tensors, values = tensor_file.parse(data, source)
    meta = tensor_file.Metadata(source, values)
    meta.expect("format", FORMAT)
    meta.expect("format_version", FORMAT_VERSION)
    if sorted(tensors) != ["cores"]:
        raise FileFormatError(source, f"tensors {sorted(tensors)[:5]}", "one tensor 'cores'")
    adapter = Adapter(
        cores=tensors["cores"],
        basis=meta.text("basis"),
        name=meta.optional("name") or "",
        base_model=parse_base_model(meta),
        info=meta.json_object("info"),
        version=version or version_of(data),
    )
    _check_cores(adapter.cores, source)
    if basis is not None:
        check_basis(adapter, basis, source)
    return adapter


def save_adapter(adapter: Adapter, path: str | Path) -> Adapter:
    """Write the file whole or not at all; returns the adapter with its version."""
    data = serialize_adapter(adapter, str(path))
    atomic.write_bytes(Path(path), data)
    return parse_adapter(data, str(path))


def serialize_adapter(adapter: Adapter, source: str = "adapter") -> bytes:
    """The adapter file's bytes; equal adapters give equal bytes."""
    _check_cores(adapter.cores, source)
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "basis": adapter.basis,
        "name": adapter.name,
        "info": tensor_file.dump_json(adapter.info),
    }
    if adapter.base_model is not None:
        values["base_model"] = tensor_file.dump_json(adapter.base_model.as_json())
    return tensor_file.serialize({"cores": adapter.cores.detach().cpu()}, values)


def version_of(data: bytes) -> str:
    """The adapter version: SHA-256 of the file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def max_file_bytes(basis: Basis) -> int:
    """The most bytes that an adapter file of this basis may have where one is sent to a server."""
    return 4 * basis.size + HEADER_ALLOWANCE


def check_basis(adapter: Adapter, basis: Basis, source: str) -> None:
    """Raise unless the adapter was made for `basis`, with as many numbers as it has."""
    if adapter.basis != basis.digest:
        raise BasisMismatchError(
            f"{source}: found an adapter for basis {adapter.basis}, expected {basis.digest}"
        )
    if adapter.cores.numel() != basis.size:
        raise FileFormatError(source, f"{adapter.cores.numel()} core numbers", f"{basis.size}")


def _check_cores(cores: torch.Tensor, source: str) -> None:
    if cores.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        found = f"cores of dtype {str(cores.dtype).removeprefix('torch.')}"
        raise FileFormatError(source, found, f"one of {names}")
    if cores.dim() != 1 or cores.numel() == 0:
        raise FileFormatError(source, f"cores of shape {list(cores.shape)}", "a flat vector [D]")
    bad = _count_not_finite(cores)
    if bad:
        raise FileFormatError(source, f"{bad} NaN or Inf values in cores", "finite numbers")


def _count_not_finite(cores: torch.Tensor) -> int:
    """By numpy, as torch would start a pool of threads for each of the threads that check files."""
    mask = EXPONENTS[cores.dtype]
    integers = torch.int16 if cores.element_size() == 2 else torch.int32
    bits = cores.detach().cpu().contiguous().view(integers).numpy()
    return int(np.count_nonzero((bits & mask) == mask))

"""Strict reading and byte-reproducible writing of single safetensors files.

Only the safetensors library parses tensors; this file adds what it leaves open: one-line errors
that name the file, metadata from bytes, and a fixed order of the metadata keys.
"""

import json
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lorasb_runtime.errors import FileFormatError, NotFoundError

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

Tensors = dict[str, torch.Tensor]


def read_file(path: Path) -> bytes:
    """All bytes of `path`. Raises NotFoundError where there is no such file."""
    if path.is_dir():
        raise FileFormatError(str(path), "a folder", "a safetensors file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None


def parse(data: bytes, source: str) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file's bytes; `source` names it in errors.

    Raises FileFormatError for anything that is not one whole, well-formed safetensors file.
    """
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise FileFormatError(
            source, f"{len(data)} bytes that do not parse ({detail})", "a whole safetensors file"
        ) from None
    return tensors, header(data).get("__metadata__", {})


def map_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """As `parse`, with tensors that lie in the file's memory map.

    Raises NotFoundError and FileFormatError.
    """
    if path.is_dir() or not path.exists():
        read_file(path)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        size, detail = path.stat().st_size, " ".join(str(error).split())
        raise FileFormatError(
            str(path), f"{size} bytes that do not parse ({detail})", "a whole safetensors file"
        ) from None


def serialize(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """The file's bytes; the same input gives the same bytes (metadata keys are sorted).

    safetensors itself writes its metadata in hash order, which differs from run to run.
    """
    data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, metadata)
    parsed = header(data)
    parsed["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(parsed, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + _header_length(data) :]


def header(data: bytes) -> dict[str, Any]:
    """The parsed JSON header of bytes that safetensors has already accepted."""
    parsed: dict[str, Any] = json.loads(data[8 : 8 + _header_length(data)])
    return parsed


def _header_length(data: bytes) -> int:
    return int(struct.unpack_from("<Q", data)[0])


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a (large) file without its tensors, and where the tensor bytes start.

    Raises FileFormatError when the file is too short for what it says or is no safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = _header_length(start) if len(start) == 8 else -1
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise FileFormatError(
                str(path), f"{size} bytes without a safetensors header", "a safetensors file"
            )
        try:
            parsed = json.loads(file.read(length))
        except ValueError:
            parsed = None
    if not isinstance(parsed, dict):
        raise FileFormatError(str(path), "a header that is no JSON object", "a safetensors file")
    return parsed, 8 + length


class Metadata:
    """A file's metadata with typed access, each refusal naming the file and the field."""

    def __init__(self, source: str, values: dict[str, str]) -> None:
        self.source = source
        self._values = values

    def text(self, key: str) -> str:
        if key not in self._values:
            raise FileFormatError(self.source, f"no metadata field {key!r}", f"{key!r} to be set")
        return self._values[key]

    def optional(self, key: str) -> str | None:
        return self._values.get(key)

    def expect(self, key: str, wanted: str) -> None:
        found = self.text(key)
        if found != wanted:
            raise FileFormatError(self.source, f"{key} {found!r}", f"{wanted!r}")

    def json(self, key: str, default: Any = None) -> Any:
        """The field's JSON value, or `default` where the field is absent."""
        if key not in self._values:
            return default
        try:
            return json.loads(self._values[key])
        except ValueError:
            found = f"{key} {self._values[key][:60]!r}"
            raise FileFormatError(self.source, found, "valid JSON in it") from None

    def json_object(self, key: str) -> dict[str, Any]:
        value = self.json(key, {})
        if not isinstance(value, dict):
            raise FileFormatError(self.source, f"{key} of another kind", "a JSON object")
        return value


def dump_json(value: Any) -> str:
    """Compact JSON in one fixed form."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

"""Basis files: the frozen pairs (B, A) of every target module, shared by all adapters."""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.errors import FileFormatError
from lorasb_runtime.storage import atomic, tensor_file
from lorasb_runtime.types import BaseModelId, TargetModule, core_offsets

FORMAT = "lorasb-basis"
FORMAT_VERSION = "1"
METHODS = ("lora-sb", "lora-xs", "joint", "imported")


@dataclass(frozen=True)
class Basis:
    """B, A and optionally the initial core of each target module, in the cores' order.

    tensors (float32): `<module>.A` [r, in], `<module>.B` [out, r], optionally `<module>.R0` [r, r].
    scaling multiplies B @ R @ A. A base model with a null fingerprint is unverified.
    """

    targets: tuple[TargetModule, ...]
    tensors: dict[str, torch.Tensor]
    method: str
    scaling: float = 1.0
    base_model: BaseModelId | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def a(self, module: str) -> torch.Tensor:
        return self.tensors[f"{module}.A"]

    def b(self, module: str) -> torch.Tensor:
        return self.tensors[f"{module}.B"]

    def r0(self, module: str) -> torch.Tensor | None:
        return self.tensors.get(f"{module}.R0")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each target's core in the flat vector, then D."""
        return core_offsets(self.targets)

    @property
    def size(self) -> int:
        """D, the length of an adapter's flat cores vector."""
        return self.offsets[-1]

    @cached_property
    def digest(self) -> str:
        """`sha256:` of targets, scaling and tensors: what adapters name."""
        return compute_digest(self)

    def core(self, cores: torch.Tensor, index: int) -> torch.Tensor:
        """View of target `index`'s core [r, r] in a flat vector [D]."""
        rank = self.targets[index].rank
        return cores[self.offsets[index] : self.offsets[index + 1]].view(rank, rank)


def compute_digest(basis: Basis) -> str:
    """SHA-256 over the canonical targets, the scaling and every tensor's name, shape and bytes."""
    sha = hashlib.sha256()
    sha.update(tensor_file.dump_json([_target_json(t) for t in basis.targets]).encode())
    sha.update(f"|{basis.scaling!r}|".encode())
    for name in sorted(basis.tensors):
        tensor = basis.tensors[name].contiguous()
        sha.update(f"{name}|{list(tensor.shape)}|".encode())
        sha.update(tensor.numpy().data)
    return f"sha256:{sha.hexdigest()}"


def load_basis(path: str | Path) -> Basis:
    """Read and check a basis file. Raises NotFoundError or FileFormatError."""
    return parse_basis(tensor_file.read_file(Path(path)), str(path))


def map_basis(path: str | Path) -> Basis:
    """As `load_basis`, with tensors that are read from the file whenever they are used.

    For work that takes one target after the other. The file must not be changed meanwhile (a new
    one may take its place).
    """
    tensors, values = tensor_file.map_file(Path(path))
    return _checked_basis(tensors, values, str(path))


def parse_basis(data: bytes, source: str) -> Basis:
    """A basis from its file's bytes; every field, shape, dtype and the digest is checked."""
    tensors, values = tensor_file.parse(data, source)
    return _checked_basis(tensors, values, source)


def _checked_basis(tensors: tensor_file.Tensors, values: dict[str, str], source: str) -> Basis:
    meta = tensor_file.Metadata(source, values)
    meta.expect("format", FORMAT)
    meta.expect("format_version", FORMAT_VERSION)
    basis = Basis(
        targets=_parse_targets(meta),
        tensors=tensors,
        method=meta.text("method"),
        scaling=_parse_scaling(meta),
        base_model=parse_base_model(meta),
        info=meta.json_object("info"),
    )
    check_basis_content(basis, source)
    meta.expect("digest", basis.digest)
    return basis


def save_basis(basis: Basis, path: str | Path) -> None:
    """Check the basis and write its file whole or not at all; equal bases give equal bytes."""
    check_basis_content(basis, str(path))
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": basis.method,
        "scaling": repr(basis.scaling),
        "targets": tensor_file.dump_json([_target_json(t) for t in basis.targets]),
        "info": tensor_file.dump_json(basis.info),
        "digest": basis.digest,
    }
    if basis.base_model is not None:
        values["base_model"] = tensor_file.dump_json(basis.base_model.as_json())
    atomic.write_bytes(Path(path), tensor_file.serialize(basis.tensors, values))


def parse_base_model(meta: tensor_file.Metadata) -> BaseModelId | None:
    """The `base_model` field of a basis or an adapter, where it has one."""
    value = meta.json("base_model")
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise FileFormatError(meta.source, f"base_model {value!r:.80}", "an object with a name")
    for key in ("revision", "fingerprint"):
        if not isinstance(value.get(key), str | None):
            raise FileFormatError(meta.source, f"base_model.{key} {value[key]!r:.80}", "a string")
    return BaseModelId(value["name"], value.get("revision"), value.get("fingerprint"))


def check_basis_content(basis: Basis, source: str) -> None:
    """Raise FileFormatError unless the tensors are exactly those that the targets call for."""
    if basis.method not in METHODS:
        raise FileFormatError(source, f"method {basis.method!r}", f"one of {', '.join(METHODS)}")
    wanted: dict[str, list[int]] = {}
    for t in basis.targets:
        wanted[f"{t.module}.A"] = [t.rank, t.in_features]
        wanted[f"{t.module}.B"] = [t.out_features, t.rank]
        if f"{t.module}.R0" in basis.tensors:
            wanted[f"{t.module}.R0"] = [t.rank, t.rank]
    for name in sorted(wanted.keys() ^ basis.tensors.keys()):
        if name in wanted:
            raise FileFormatError(source, f"no tensor {name!r}", "one, as the targets name it")
        raise FileFormatError(source, f"a tensor {name!r}", "only those of the listed targets")
    for name, shape in wanted.items():
        tensor = basis.tensors[name]
        if tensor.dtype != torch.float32:
            raise FileFormatError(source, f"{name} of dtype {tensor.dtype}", "torch.float32")
        if list(tensor.shape) != shape:
            raise FileFormatError(source, f"{name} of shape {list(tensor.shape)}", f"{shape}")
        if not math.isfinite(tensor.abs().max().item()):
            raise FileFormatError(source, f"NaN or Inf in {name}", "finite numbers")


def _parse_scaling(meta: tensor_file.Metadata) -> float:
    text = meta.text("scaling")
    try:
        scaling = float(text)
    except ValueError:
        scaling = math.nan
    if not math.isfinite(scaling) or scaling == 0.0:
        raise FileFormatError(meta.source, f"scaling {text!r}", "a finite number other than zero")
    return scaling


def _parse_targets(meta: tensor_file.Metadata) -> tuple[TargetModule, ...]:
    meta.text("targets")
    entries = meta.json("targets")
    if not isinstance(entries, list) or not entries:
        raise FileFormatError(meta.source, "targets without entries", "a list of target modules")
    targets = tuple(_parse_target(entry, meta.source) for entry in entries)
    names = {t.module for t in targets}
    if len(names) != len(targets):
        raise FileFormatError(meta.source, "a module twice in targets", "each module once")
    return targets


def _parse_target(entry: Any, source: str) -> TargetModule:
    sizes = ("rank", "in", "out")
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("module"), str)
        or not all(type(entry.get(key)) is int and entry[key] > 0 for key in sizes)
        or not isinstance(entry.get("transposed", False), bool)
    ):
        raise FileFormatError(
            source, f"target {entry!r:.120}", "module, rank, in and out, sizes above zero"
        )
    unknown = entry.keys() - {"module", "transposed", *sizes}
    if unknown:
        raise FileFormatError(source, f"target field {sorted(unknown)[0]!r}", "only known fields")
    if entry["rank"] > min(entry["in"], entry["out"]):
        raise FileFormatError(
            source, f"rank {entry['rank']} of {entry['module']}", "at most min(in, out)"
        )
    transposed = entry.get("transposed", False)
    return TargetModule(entry["module"], entry["rank"], entry["in"], entry["out"], transposed)


def _target_json(target: TargetModule) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "module": target.module,
        "rank": target.rank,
        "in": target.in_features,
        "out": target.out_features,
    }
    if target.transposed:
        entry["transposed"] = True
    return entry

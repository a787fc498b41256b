"""Basis and adapter files: bit-for-bit round trips, and every refusal with what it names."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError, NotFoundError
from lorasb_runtime.storage.adapter_file import (
    Adapter,
    load_adapter,
    parse_adapter,
    save_adapter,
    serialize_adapter,
)
from lorasb_runtime.storage.basis_file import Basis, load_basis, parse_basis, save_basis
from lorasb_runtime.types import BaseModelId, TargetModule

MODEL = BaseModelId("pico", None, "sha256:00")


def make_basis(scaling: float = 1.0, seed: int = 0) -> Basis:
    generator = torch.Generator().manual_seed(seed)
    targets = (TargetModule("m.0.q", 2, 6, 4), TargetModule("m.0.c", 3, 5, 8, transposed=True))
    tensors = {}
    for t in targets:
        tensors[f"{t.module}.A"] = torch.randn(t.rank, t.in_features, generator=generator)
        tensors[f"{t.module}.B"] = torch.randn(t.out_features, t.rank, generator=generator)
    tensors["m.0.q.R0"] = torch.randn(2, 2, generator=generator)
    return Basis(targets, tensors, "lora-sb", scaling, MODEL, {"samples": 3, "note": "é"})


def make_adapter(basis: Basis, dtype: torch.dtype = torch.float32) -> Adapter:
    cores = torch.arange(basis.size, dtype=torch.float32).to(dtype)
    return Adapter(cores, basis.digest, "alice", basis.base_model, {"steps": 3})


def raw(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    return safetensors.torch.save(tensors, metadata)


def basis_parts(basis: Basis, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = tmp_path / "parts.safetensors"
    save_basis(basis, path)
    with safetensors.safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())  # noqa: SIM118


def test_a_basis_survives_bit_for_bit(tmp_path: Path) -> None:
    basis = make_basis(scaling=0.3)
    save_basis(basis, tmp_path / "b.safetensors")
    again = load_basis(tmp_path / "b.safetensors")
    assert again.digest == basis.digest
    assert dataclasses.replace(again, tensors={}) == dataclasses.replace(basis, tensors={})
    assert all(torch.equal(again.tensors[k], basis.tensors[k]) for k in basis.tensors)
    save_basis(again, tmp_path / "c.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_the_same_basis_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from test_files import make_basis; from lorasb_runtime import save_basis;"
        "save_basis(make_basis(), Path(sys.argv[1]))"
    )
    for name, hash_seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, "-c", code, str(tmp_path / name), str(Path(__file__).parent)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_adapter_survives_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    basis = make_basis()
    saved = save_adapter(make_adapter(basis, dtype), tmp_path / "a.safetensors")
    again = load_adapter(tmp_path / "a.safetensors", basis)
    assert torch.equal(again.cores, saved.cores) and again.cores.dtype == dtype
    assert dataclasses.replace(again, cores=saved.cores) == saved
    assert len(saved.version) == 64
    assert torch.equal(basis.core(again.cores, 1), again.cores[4:13].view(3, 3))


def test_an_adapter_needs_only_what_the_format_asks_for() -> None:
    basis = make_basis()
    meta = {"format": "lorasb-adapter", "format_version": "1", "basis": basis.digest}
    adapter = parse_adapter(raw({"cores": torch.ones(basis.size)}, meta), "x", basis)
    assert (adapter.name, adapter.base_model, adapter.info) == ("", None, {})


def adapter_meta(basis: Basis, changes: dict[str, str | None]) -> dict[str, str]:
    meta = {
        "format": "lorasb-adapter",
        "format_version": "1",
        "basis": basis.digest,
        "name": "a",
        "info": "{}",
    }
    return {k: v for k, v in {**meta, **changes}.items() if v is not None}


CORES = torch.ones(13)


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"cores": CORES}, {"format": "lorasb-basis"}, "found format 'lorasb-basis', expected"),
        ({"cores": CORES}, {"format": None}, "no metadata field 'format'"),
        ({"cores": CORES}, {"format_version": "2"}, "found format_version '2', expected '1'"),
        ({"cores": CORES}, {"basis": None}, "no metadata field 'basis'"),
        ({"cores": CORES}, {"info": "{"}, "found info '{', expected valid JSON"),
        ({"cores": CORES}, {"info": "[1]"}, "expected a JSON object"),
        ({"cores": CORES}, {"base_model": '{"name": 3}'}, "expected an object with a name"),
        ({"cores": CORES[:12]}, {}, "found 12 core numbers, expected 13"),
        ({"cores": CORES.view(13, 1)}, {}, r"found cores of shape \[13, 1\], expected a flat"),
        ({"cores": CORES.double()}, {}, "found cores of dtype float64, expected one of"),
        ({"cores": CORES * float("nan")}, {}, "found 13 NaN or Inf values in cores"),
        ({"cores": CORES.index_fill(0, torch.tensor([3]), float("inf"))}, {}, "found 1 NaN or"),
        ({"cores": CORES, "more": torch.ones(1)}, {}, "expected one tensor 'cores'"),
        ({"core": CORES}, {}, "expected one tensor 'cores'"),
    ],
)
def test_wrong_adapters_are_refused_in_one_line(
    tensors: dict[str, torch.Tensor], changes: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    basis = make_basis()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw(tensors, adapter_meta(basis, changes)))
    with pytest.raises(FileFormatError, match=message) as refusal:
        load_adapter(path, basis)
    assert str(refusal.value).startswith(str(path)) and "\n" not in str(refusal.value)


def test_an_adapter_for_another_basis_is_refused() -> None:
    data = serialize_adapter(make_adapter(make_basis(seed=1)))
    with pytest.raises(BasisMismatchError, match=r"found an adapter for basis sha256:.*expected"):
        parse_adapter(data, "x", make_basis(seed=0))


def test_scaling_is_part_of_what_adapters_name() -> None:
    assert make_basis(scaling=1.0).digest != make_basis(scaling=2.0).digest


@given(st.data())
def test_a_truncated_or_damaged_file_never_passes(data: st.DataObject) -> None:
    basis = make_basis()
    whole = serialize_adapter(make_adapter(basis))
    if data.draw(st.booleans()):
        bad = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, 40))
        bad = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    with pytest.raises(InputError):
        assert parse_adapter(bad, "x", basis).version != make_adapter(basis).version
        raise FileFormatError("x", "a change in the metadata alone", "a refusal or another version")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00.", b"\xff" * 64, b"{}" * 9])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "no.safetensors"
    path.write_bytes(content)
    for load in (load_adapter, load_basis):
        with pytest.raises(FileFormatError, match="expected a whole safetensors file"):
            load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.safetensors: no such file"):
        load_basis(tmp_path / "gone.safetensors")


def change_targets(meta: dict[str, str], **changes: object) -> None:
    targets = json.loads(meta["targets"])
    targets[0].update(changes)
    meta["targets"] = json.dumps(targets)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "lorasb-adapter", "expected 'lorasb-basis'"),
        ("format_version", "9", "found format_version '9'"),
        ("method", "magic", "found method 'magic', expected one of lora-sb"),
        ("scaling", "0", "found scaling '0'"),
        ("scaling", "nan", "found scaling 'nan'"),
        ("scaling", "2.0", "found digest"),
        ("digest", "sha256:00", "found digest 'sha256:00', expected 'sha256:"),
        ("targets", "[]", "targets without entries"),
        ("targets", '[{"module": "x"}]', "expected module, rank, in and out"),
    ],
)
def test_wrong_basis_metadata_is_refused(
    key: str, value: str, message: str, tmp_path: Path
) -> None:
    tensors, meta = basis_parts(make_basis(), tmp_path)
    with pytest.raises(FileFormatError, match=message):
        parse_basis(raw(tensors, {**meta, key: value}), "b")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("m.0.q.A", None, "no tensor 'm.0.q.A'"),
        ("m.0.q.A", torch.ones(2, 5), r"m.0.q.A of shape \[2, 5\], expected \[2, 6\]"),
        ("m.0.q.A", torch.ones(2, 6, dtype=torch.bfloat16), "expected torch.float32"),
        ("m.0.q.B", torch.full((4, 2), float("nan")), "NaN or Inf in m.0.q.B"),
        ("m.0.q.R0", torch.ones(3, 3), r"m.0.q.R0 of shape \[3, 3\], expected \[2, 2\]"),
        ("m.9.q.A", torch.ones(2, 6), "found a tensor 'm.9.q.A', expected only those"),
        ("m.0.q.B", torch.ones(4, 2), "found digest"),
    ],
)
def test_wrong_basis_tensors_are_refused(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    tensors, meta = basis_parts(make_basis(), tmp_path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(FileFormatError, match=message):
        parse_basis(raw(tensors, meta), "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "sizes above zero"),
        ({"rank": True}, "sizes above zero"),
        ({"rank": 99}, "expected at most min"),
        ({"module": "m.0.c"}, "a module twice"),
        ({"extra": 1}, "target field 'extra'"),
        ({"in": 7}, r"expected \[2, 7\]"),
    ],
)
def test_wrong_targets_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    tensors, meta = basis_parts(make_basis(), tmp_path)
    change_targets(meta, **changes)
    with pytest.raises(FileFormatError, match=message):
        parse_basis(raw(tensors, meta), "b")

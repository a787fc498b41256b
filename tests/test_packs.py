"""Packs: what goes in comes out byte for byte, and what is no pack is refused."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bases import random_adapter, random_basis
from fake_engine import tiny_basis
from hypothesis import given
from hypothesis import strategies as st
from serving import serving
from typer.testing import CliRunner

from lorasb_runtime.adapters.catalog import list_adapters
from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.pack_files import PackFiles
from lorasb_runtime.adapters.packing import pack_store
from lorasb_runtime.adapters.retry import Retry
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import (
    BasisMismatchError,
    ConflictError,
    FileFormatError,
    InputError,
    LorasbError,
    NotFoundError,
)
from lorasb_runtime.storage.adapter_file import (
    Adapter,
    parse_adapter,
    serialize_adapter,
    version_of,
)
from lorasb_runtime.storage.basis_file import save_basis
from lorasb_runtime.storage.pack_file import PackFile, write_pack
from lorasb_tools.cli import app

BASIS = tiny_basis()
ALICE = parse_name("alice")


def nothing(*_: int) -> None:
    """No report."""


def adapter(seed: int, dtype: torch.dtype = torch.float32, basis: str = BASIS.digest) -> bytes:
    cores = torch.randn(BASIS.size, generator=torch.Generator().manual_seed(seed))
    return serialize_adapter(Adapter(cores.to(dtype), basis, f"a{seed}", info={"seed": seed}))


def filled(folder: Path, files: dict[str, bytes]) -> AdapterStore:
    store = AdapterStore(str(folder / "store"))
    for name, data in files.items():
        store.publish(parse_name(name), data)
    return store


@given(dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), min_size=1))
def test_adapter_files_come_back_byte_for_byte(
    dtypes: list[torch.dtype], tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = [adapter(seed, dtype) for seed, dtype in enumerate(dtypes)]
    names = [f"user-{index:04}" for index in range(len(files))]
    path = tmp_path_factory.mktemp("pack") / "all.safetensors"
    pack = write_pack(path, names, lambda index: files[index], nothing)
    assert pack.names == names
    assert pack.dtype == (dtypes[0] if len(set(dtypes)) == 1 else torch.float32)
    for index, data in enumerate(files):
        assert pack.adapter_bytes(index) == data
        assert pack.file_bytes(index) == len(data)
        for nbytes in (0, 9, len(data) - 1, len(data), len(data) + 1):
            assert pack.adapter_bytes(index, nbytes) == data[:nbytes]
        assert pack.versions[index] == version_of(data)


def test_a_pack_reads_as_a_store_and_takes_no_changes(tmp_path: Path) -> None:
    files = {"alice": adapter(1), "team/bob": adapter(2, torch.bfloat16)}
    store = filled(tmp_path, files)
    pack_store(store, tmp_path / "p.safetensors", None, nothing)
    packed = AdapterStore(str(tmp_path / "p.safetensors"))
    assert packed.names() == store.names()
    assert [replace(e, modified=None) for e in list_adapters(store)] == list_adapters(packed)
    for text, data in files.items():
        name = parse_name(text)
        assert packed.fetch(name, packed.current(name)) == data
        assert [v.version for v in packed.versions(name)] == [version_of(data)]
    with pytest.raises(NotFoundError):
        packed.current(parse_name("carol"))
    with pytest.raises(NotFoundError):
        packed.fetch(ALICE, "0" * 64)
    for change in (
        lambda: packed.publish(ALICE, adapter(3)),
        lambda: packed.delete(ALICE),
        lambda: packed.rollback(ALICE, packed.current(ALICE)),
    ):
        with pytest.raises(ConflictError, match="read only"):
            change()


def test_the_loader_reads_versions_from_the_pack_and_names_from_the_store(tmp_path: Path) -> None:
    store = filled(tmp_path, {"alice": adapter(1), "bob": adapter(2)})
    path = tmp_path / "p.safetensors"
    pack_store(store, path, None, nothing)
    store.publish(ALICE, adapter(9))
    store.delete(parse_name("bob"))
    loader = AdapterLoader(store, BASIS, pack=PackFiles(str(path), Retry()))
    assert loader.get(ALICE).version == version_of(adapter(9))
    assert loader.stats().fetches == 1
    loader.rollback(ALICE, version_of(adapter(1)))
    assert loader.get(ALICE).version == version_of(adapter(1))
    assert (loader.stats().fetches, loader.stats().pack_hits) == (1, 1)
    with pytest.raises(NotFoundError):
        loader.get(parse_name("bob"))
    loader.close()


def test_a_damaged_row_is_found_and_the_store_is_asked_instead(tmp_path: Path) -> None:
    store = filled(tmp_path, {"alice": adapter(1)})
    path = tmp_path / "p.safetensors"
    pack_store(store, path, None, nothing)
    damaged = bytearray(path.read_bytes())
    damaged[8 + struct.unpack_from("<Q", damaged)[0]] ^= 1  # the first number's lowest bit
    path.write_bytes(damaged)
    with pytest.raises(FileFormatError, match="digest"):
        AdapterStore(str(path)).fetch(ALICE, version_of(adapter(1)))
    loader = AdapterLoader(store, BASIS, pack=PackFiles(str(path), Retry()))
    expected = parse_adapter(adapter(1), "adapter").cores
    assert torch.equal(loader.get(ALICE).cores, expected)
    assert (loader.stats().fetches, loader.stats().pack_hits) == (1, 0)
    loader.close()


def test_packing_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path, {"alice": adapter(1), "bob": adapter(2, basis="sha256:" + "0" * 64)})
    path = tmp_path / "p.safetensors"

    def refused(error: type[LorasbError], message: str, *names: str) -> None:
        chosen = [parse_name(name) for name in names] or None
        with pytest.raises(error, match=message):
            pack_store(store, path, chosen, nothing)
        assert [p.name for p in tmp_path.iterdir()] == ["store"]

    refused(BasisMismatchError, "'bob': found one for basis sha256:0000")
    refused(NotFoundError, "carol", "alice", "carol")
    pack_store(store, path, [ALICE], nothing)
    with pytest.raises(ConflictError, match="--force"):
        pack_store(store, path, [ALICE], nothing)
    pack_store(store, path, [parse_name("bob")], nothing, force=True)
    assert PackFile(path).names == ["bob"]
    with pytest.raises(BasisMismatchError, match=r"p\.safetensors: found a pack for basis"):
        AdapterLoader(AdapterStore(str(path)), BASIS)
    with pytest.raises(InputError, match="no adapters"):
        pack_store(AdapterStore(str(tmp_path / "empty")), tmp_path / "q", None, nothing)


def edited(data: bytes, change: Any) -> bytes:
    """A safetensors file with its header changed."""
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["__metadata__"].update(format="lorasb-basis"), "format 'lorasb-basis'"),
        (lambda h: h["__metadata__"].update(format_version="2"), "format_version '2'"),
        (lambda h: h["__metadata__"].update(names='["b", "a"]'), "names out of order"),
        (lambda h: h["__metadata__"].update(names='["a", "b", "c"]'), "a pack of 3 adapters"),
        (lambda h: h["__metadata__"].update(names='{"a": 1}'), "names of another kind"),
        (lambda h: h["cores"].update(dtype="Q4"), "no pack's"),
        (lambda h: h.pop("versions"), "a pack of 2 adapters"),
        (lambda h: h["cores"]["shape"].reverse(), "expected those of a pack"),
    ],
)
def test_what_is_no_pack_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_pack(path, ["a", "b"], lambda index: adapter(index), nothing)
    path.write_bytes(edited(path.read_bytes(), change))
    with pytest.raises(FileFormatError, match=message):
        PackFile(path)


def test_a_pack_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_pack(path, ["a"], lambda index: adapter(index), nothing)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            PackFile(path)


def test_a_server_on_a_pack(pico: Path, tmp_path: Path) -> None:
    basis = random_basis(pico)
    save_basis(basis, tmp_path / "b.safetensors")
    data = {f"u{i}": serialize_adapter(random_adapter(basis, i, 3.0)) for i in range(3)}
    store = filled(tmp_path, data)
    path = tmp_path / "p.safetensors"
    result = CliRunner().invoke(app, ["pack", store.url, "-o", str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["adapters"] == 3

    def answers(*flags: object) -> tuple[list[str], str]:
        flags = ("--basis", tmp_path / "b.safetensors", *flags)
        with serving(tmp_path / "log", pico, *flags) as url:
            listed = [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]]
            texts = []
            for name in data:
                body = {"model": name, "prompt": "hello", "max_tokens": 8, "temperature": 0}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
                texts.append(answer.raise_for_status().json()["choices"][0]["text"])
            put = httpx.put(f"{url}/v1/adapters/new", content=data["u0"], timeout=30)
            return [*listed[1:], *texts], str(put.status_code)

    from_store = answers("--adapters", store.url)
    assert from_store[1] == "200"
    assert answers("--pack", path) == (from_store[0], "409")
    AdapterStore(store.url).delete(parse_name("new"))
    assert answers("--adapters", store.url, "--pack", path) == from_store

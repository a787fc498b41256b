"""The adapter store and the loader: publishing, versions, swaps, and what a reader may see."""

import threading
import time
from pathlib import Path

import pytest
import torch

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_config import LoaderConfig
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import (
    BasisMismatchError,
    ConflictError,
    FileFormatError,
    InputError,
    NotFoundError,
)
from lorasb_runtime.storage.adapter_file import Adapter, serialize_adapter, version_of
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import TargetModule

ALICE = parse_name("alice")


@pytest.fixture
def basis() -> Basis:
    target = TargetModule("m", 2, 3, 3)
    return Basis((target,), {"m.A": torch.ones(2, 3), "m.B": torch.ones(3, 2)}, "imported", 0.5)


def adapter(basis: Basis, value: int) -> bytes:
    return serialize_adapter(Adapter(torch.full((4,), float(value)), basis.digest, "x"))


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> AdapterStore:
    if request.param == "local":
        return AdapterStore(str(tmp_path / "store"))
    return AdapterStore(f"memory://{tmp_path.name}")


def test_names() -> None:
    assert parse_name("alice") == AdapterName("default", "alice")
    assert parse_name("team/a.b-c_1") == AdapterName("team", "a.b-c_1")
    assert [str(parse_name(n)) for n in ("default/x", "team/x")] == ["x", "team/x"]
    bad = ["", "/", "a/", "/a", "a/b/c", "..", "a/..", ".", "a..b", "é", "a b", "x" * 65]
    for name in [*bad, "versions", "a/rollback", "rollback/a", "a\n"]:
        with pytest.raises(InputError, match="adapter name: found"):
            parse_name(name)


def test_layout_on_disk(tmp_path: Path, basis: Basis) -> None:
    data = adapter(basis, 1)
    version = AdapterStore(str(tmp_path)).publish(parse_name("team/bob"), data)
    assert version == version_of(data)
    assert (tmp_path / "team/bob" / f"{version}.safetensors").read_bytes() == data
    assert (tmp_path / "team/bob/current").read_text() == version


def test_publish_list_and_roll_back(store: AdapterStore, basis: Basis) -> None:
    first = store.publish(ALICE, adapter(basis, 1))
    second = store.publish(ALICE, adapter(basis, 2))
    store.publish(parse_name("team/bob"), adapter(basis, 3))
    assert store.current(ALICE) == second
    assert store.names() == [ALICE, parse_name("team/bob")]
    assert {(v.version, v.current) for v in store.versions(ALICE)} == {
        (first, False),
        (second, True),
    }
    store.rollback(ALICE, first)
    assert store.current(ALICE) == first
    store.delete(ALICE)
    assert store.names() == [parse_name("team/bob")]
    with pytest.raises(NotFoundError):
        store.current(ALICE)


def test_stray_files_do_not_hide_the_adapters(tmp_path: Path, basis: Basis) -> None:
    store = AdapterStore(str(tmp_path))
    store.publish(ALICE, adapter(basis, 1))
    for stray in ("README", "a b/c/current", "x/current", "team/deep/er/current"):
        (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stray).write_text("?")
    assert store.names() == [ALICE]


def test_unknown_names_and_versions(store: AdapterStore, basis: Basis) -> None:
    with pytest.raises(NotFoundError, match="adapter 'alice' not found"):
        store.current(ALICE)
    store.publish(ALICE, adapter(basis, 1))
    with pytest.raises(NotFoundError, match="version"):
        store.rollback(ALICE, "0" * 64)
    with pytest.raises(InputError, match="expected 64 hex digits"):
        store.fetch(ALICE, "../../etc/passwd")
    with pytest.raises(InputError, match="nonsense"):
        AdapterStore("nonsense://x")


def test_damaged_bytes_are_refused(tmp_path: Path, basis: Basis) -> None:
    store = AdapterStore(str(tmp_path))
    version = store.publish(ALICE, adapter(basis, 1))
    path = tmp_path / "default/alice" / f"{version}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=f"expected digest {version}"):
        store.fetch(ALICE, version)
    (tmp_path / "default/alice/current").write_text("latest")
    with pytest.raises(FileFormatError, match="found 'latest'"):
        store.current(ALICE)


def test_readers_see_the_old_version_or_the_new_one(store: AdapterStore, basis: Basis) -> None:
    known = {version_of(adapter(basis, i)) for i in range(40)}
    store.publish(ALICE, adapter(basis, 0))
    failures: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                version = store.current(ALICE)
                assert version in known
                store.fetch(ALICE, version)
            except BaseException as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(40):
        store.publish(ALICE, adapter(basis, i))
    done.set()
    for reader in readers:
        reader.join()
    assert not failures


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_loader_caches_and_refreshes(store: AdapterStore, basis: Basis) -> None:
    clock = Clock()
    loader = AdapterLoader(store, basis, LoaderConfig(refresh=1.0), clock=clock)
    store.publish(ALICE, adapter(basis, 4))
    first = loader.get(ALICE)
    assert first.cores.tolist() == [4, 4, 4, 4]  # scaled in the slot
    store.publish(ALICE, adapter(basis, 6))
    assert loader.get(ALICE).version == first.version
    clock.now = 1.0
    assert loader.get(ALICE).cores.tolist() == [6, 6, 6, 6]
    published = loader.publish(ALICE, adapter(basis, 8))
    assert loader.get(ALICE).version == published.version


def test_the_loader_rolls_back_and_deletes(store: AdapterStore, basis: Basis) -> None:
    loader = AdapterLoader(store, basis)
    first = loader.publish(ALICE, adapter(basis, 1))
    with pytest.raises(ConflictError, match="no version before"):
        loader.rollback(ALICE, None)
    time.sleep(0.02)
    second = loader.publish(ALICE, adapter(basis, 2))
    assert loader.rollback(ALICE, None).version == first.version
    assert loader.get(ALICE).version == first.version
    assert loader.rollback(ALICE, second.version).version == second.version
    loader.delete(ALICE)
    with pytest.raises(NotFoundError):
        loader.get(ALICE)


def test_the_loader_refuses_what_is_not_for_its_basis(store: AdapterStore, basis: Basis) -> None:
    loader = AdapterLoader(store, basis)
    other = Basis(basis.targets, basis.tensors, "imported", 0.25)
    with pytest.raises(BasisMismatchError):
        loader.publish(ALICE, adapter(other, 1))
    assert store.names() == []
    store.publish(ALICE, adapter(other, 1))
    with pytest.raises(BasisMismatchError):
        loader.get(ALICE)


def test_the_loader_cache_keeps_to_its_budget(store: AdapterStore, basis: Basis) -> None:
    loader = AdapterLoader(store, basis, LoaderConfig(cache_bytes=40))
    for i in range(5):
        loader.publish(parse_name(f"u{i}"), adapter(basis, i))
    assert loader.stats().cached_bytes <= 40
    assert loader.get(parse_name("u0")).cores.tolist() == [0, 0, 0, 0]


def test_many_threads_fetch_a_version_once(store: AdapterStore, basis: Basis) -> None:
    store.publish(ALICE, adapter(basis, 1))
    fetched: list[str] = []
    original = store.fetch

    def counting(name: AdapterName, version: str, limit: int) -> bytes:
        fetched.append(version)
        time.sleep(0.05)
        return original(name, version, limit)

    store.fetch = counting  # type: ignore[method-assign]
    loader = AdapterLoader(store, basis)
    threads = [threading.Thread(target=loader.get, args=(ALICE,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1

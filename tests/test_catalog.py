"""Listing a store: what is shown, what it costs, and the commands around it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from buckets import BUCKET, KEYS, plain_http, s3_service
from fake_engine import adapter_bytes, tiny_basis
from faulty_proxy import faulty_proxy
from typer.testing import CliRunner

from lorasb_runtime.adapters.catalog import describe, list_adapters
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.retry import Retry, RetryConfig
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import (
    ConflictError,
    FileFormatError,
    InputError,
    NotFoundError,
    StoreError,
)
from lorasb_runtime.storage.adapter_file import Adapter, serialize_adapter, version_of
from lorasb_tools.cli import app

ALICE = parse_name("alice")
BASIS = tiny_basis()


def lorasb(*words: object) -> Any:
    """One command's JSON."""
    result = CliRunner().invoke(app, [*(str(word) for word in words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_damaged_adapter_is_shown_and_hides_no_other(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path))
    names = [parse_name(name) for name in ("a", "b", "c", "d", "team/e")]
    versions = [store.publish(n, adapter_bytes(BASIS, float(i))) for i, n in enumerate(names)]
    (tmp_path / "default/a/current").write_text("junk")
    Path(store.path(names[1], versions[1])).unlink()
    cut = Path(store.path(names[2], versions[2]))
    cut.write_bytes(cut.read_bytes()[:-1])
    Path(store.path(names[3], versions[3])).write_bytes(b"not an adapter at all")
    entries = list_adapters(store)
    assert [e.name for e in entries] == names
    problems = [e.problem or "" for e in entries]
    for problem, text in zip(
        problems, ("junk", "not in the store", "as its header says", "without a safe"), strict=False
    ):
        assert text in problem
    good = entries[4]
    assert good.problem is None and good.modified is not None
    assert (good.version, good.versions, good.basis) == (versions[4], 1, BASIS.digest)
    for name in names[:4]:
        with pytest.raises(FileFormatError):
            describe(store, name)
    with pytest.raises(NotFoundError):
        describe(store, parse_name("nobody"))


def test_a_long_header_is_read_whole(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path))
    cores = torch.ones(BASIS.size)
    info = {"note": "x" * 10_000}
    store.publish(ALICE, serialize_adapter(Adapter(cores, BASIS.digest, info=info)))
    assert list_adapters(store)[0].basis == BASIS.digest


def test_a_listing_of_a_bucket_takes_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_service() as service, faulty_proxy(service) as proxy:
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(key, value)
        store = AdapterStore(f"s3://{BUCKET}/store")
        for i in range(20):
            store.publish(parse_name(f"u{i}"), adapter_bytes(BASIS, float(i)))
        proxy.requests.clear()
        assert len(list_adapters(store)) == 20
        assert len(proxy.requests) == 1 + 2 * 20
        proxy.fault = "500"
        broken = AdapterStore(f"s3://{BUCKET}/store", Retry(RetryConfig(2, first_wait=0.01)))
        proxy.requests.clear()
        with pytest.raises(StoreError):
            list_adapters(broken)
        assert len(proxy.requests) == 2  # nobody below us repeats what we repeat


def test_publish_roll_back_and_prune_by_command(tmp_path: Path) -> None:
    store = tmp_path / "store"
    versions = []
    for i in range(3):
        file = tmp_path / f"{i}.safetensors"
        file.write_bytes(adapter_bytes(BASIS, float(i)))
        versions.append(version_of(file.read_bytes()))
        lorasb("publish", file, store, "team/alice")
    (listed,) = lorasb("adapters", store)["adapters"]
    assert listed["name"] == "team/alice" and listed["versions"] == 3
    assert listed["version"] == versions[2] and listed["basis"] == BASIS.digest
    back = lorasb("rollback", store, "team/alice", versions[0][:10])
    assert back["version"] == versions[0] and back["previous"] == versions[2]
    dry = lorasb("prune", store, "--keep", 0, "--dry-run")
    assert {r["version"] for r in dry["removed"]} == set(versions[1:])
    kept = lorasb("prune", store, "team/alice", "--keep", 1)
    assert len(kept["removed"]) == 1
    assert AdapterStore(str(store)).current(parse_name("team/alice")) == versions[0]
    text = CliRunner().invoke(app, ["adapters", str(store)]).stdout
    assert "team/alice" in text and "2 versions" in text and "seconds ago" in text


def test_a_folder_of_adapters_is_published_whole_or_refused(tmp_path: Path) -> None:
    folder, store = tmp_path / "files", tmp_path / "store"
    folder.mkdir()
    for name in ("ann", "ben"):
        (folder / f"{name}.safetensors").write_bytes(adapter_bytes(BASIS, 1.0))
    (folder / "basis.safetensors").write_bytes(b"left alone")
    said = lorasb("publish", folder, store)
    assert [row["name"] for row in said["published"]] == ["ann", "ben"]
    lorasb("publish", folder, store, "team")
    names = [str(name) for name in AdapterStore(str(store)).names()]
    assert names == ["ann", "ben", "team/ann", "team/ben"]
    (folder / "cat.safetensors").write_bytes(b"damaged")
    for words, text in (
        ((folder, tmp_path / "other"), "cat.safetensors"),
        ((tmp_path, store), "found no adapter files"),
        ((folder, store, "a/b"), "namespace"),
        ((folder / "ann.safetensors", store), "found a file and no NAME"),
    ):
        result = CliRunner().invoke(app, ["publish", *map(str, words)])
        assert result.exit_code and text in str(result.exception)
    assert not (tmp_path / "other").exists()


def test_roll_backs_by_command_that_cannot_be(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path))
    version = store.publish(ALICE, b"x")
    for words, error in (
        (["alice"], ConflictError),
        (["alice", "f" * 64], NotFoundError),
        (["nobody"], NotFoundError),
    ):
        result = CliRunner().invoke(app, ["rollback", str(tmp_path), *words])
        assert isinstance(result.exception, error)
    assert store.current(ALICE) == version


def test_a_plain_http_server_is_read_by_name_and_nothing_else(tmp_path: Path) -> None:
    folder = AdapterStore(str(tmp_path))
    version = folder.publish(ALICE, adapter_bytes(BASIS, 1.0))
    with plain_http(tmp_path) as address:
        store = AdapterStore(f"http://user:secret@{address}")
        assert "secret" not in store.url
        assert store.current(ALICE) == version
        assert version_of(store.fetch(ALICE, version)) == version
        assert describe(store, ALICE).basis == BASIS.digest
        with pytest.raises(NotFoundError):
            store.current(parse_name("nobody"))
        for write in (
            lambda: store.publish(ALICE, b"x"),
            lambda: store.rollback(ALICE, version),
            lambda: store.delete(ALICE),
        ):
            with pytest.raises(ConflictError, match="an http store, which is read only"):
                write()
        with pytest.raises(ConflictError, match="cannot be listed"):
            store.names()
    with pytest.raises(StoreError) as refused:
        AdapterStore(f"http://{address}", Retry(RetryConfig(1))).current(ALICE)
    assert refused.value.transient


def test_a_chain_of_file_systems_is_refused() -> None:
    with pytest.raises(InputError, match="found a chain"):
        AdapterStore("simplecache::s3://bucket")

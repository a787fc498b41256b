"""Pruning: what goes, what stays, and what a roll-back or publishing at that moment does to it."""

import os
import threading
from pathlib import Path

import pytest

from lorasb_runtime.adapters.files import FileInfo
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.adapters.prune import PruneConfig, prune
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import NotFoundError

ALICE, BOB = parse_name("alice"), parse_name("team/bob")
DAY = 86400.0


def publish(store: AdapterStore, name: AdapterName, count: int) -> list[str]:
    """Versions that are `count` days old, and one day less each."""
    versions = []
    for i in range(count):
        versions.append(store.publish(name, f"{name} {i}".encode()))
        os.utime(store.path(name, versions[-1]), (i * DAY, i * DAY))
    return versions


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(str(tmp_path))


def left(store: AdapterStore, name: AdapterName) -> set[str]:
    return {v.version for v in store.versions(name)}


def test_the_current_and_the_newest_others_stay(store: AdapterStore) -> None:
    alice, bob = publish(store, ALICE, 5), publish(store, BOB, 2)
    store.rollback(ALICE, alice[0])
    dry = prune(store, PruneConfig(keep=2, dry_run=True))
    assert {v.version for v in dry.versions} == {alice[1], alice[2]}
    assert left(store, ALICE) == set(alice)
    assert prune(store, PruneConfig(keep=2)) == dry
    assert left(store, ALICE) == {alice[0], alice[3], alice[4]}
    assert left(store, BOB) == set(bob)
    assert store.current(ALICE) == alice[0]


def test_only_the_named_and_only_the_old_ones(store: AdapterStore) -> None:
    alice, bob = publish(store, ALICE, 4), publish(store, BOB, 4)
    config = PruneConfig(keep=0, older_than=2 * DAY)
    report = prune(store, config, [BOB], now=lambda: 3 * DAY)
    assert {v.version for v in report.versions} == {bob[0], bob[1]}
    assert left(store, ALICE) == set(alice) and left(store, BOB) == {bob[2], bob[3]}
    with pytest.raises(NotFoundError, match="carol"):
        prune(store, config, [parse_name("carol")])


def test_an_adapter_whose_current_is_damaged_is_left_alone(
    store: AdapterStore, tmp_path: Path
) -> None:
    alice, bob = publish(store, ALICE, 2), publish(store, BOB, 2)
    (tmp_path / "default/alice/current").write_text("junk")
    report = prune(store, PruneConfig(keep=0))
    assert len(report.problems) == 1 and "junk" in report.problems[0]
    assert {v.version for v in report.versions} == {bob[0]}
    assert store.fetch(ALICE, alice[0])


def test_a_roll_back_between_listing_and_removing_saves_the_version(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = publish(store, ALICE, 2)
    listing = store.listing

    def and_roll_back() -> dict[AdapterName, dict[str, FileInfo]]:
        found = listing()
        store.rollback(ALICE, old)
        return found

    monkeypatch.setattr(store, "listing", and_roll_back)
    assert prune(store, PruneConfig(keep=0)).versions[0].version == new
    assert store.current(ALICE) == old and store.fetch(ALICE, old)


@pytest.mark.parametrize("last", ["roll back", "prune"])
def test_whoever_comes_last_repairs_a_version_removed_as_it_became_current(
    store: AdapterStore, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two meet between prune's look at `current` and its removal."""
    old, _ = publish(store, ALICE, 2)
    remove, write = store.files.remove, store.files.write
    ready, removed = threading.Event(), threading.Event()

    def slow_remove(path: str) -> None:
        assert ready.wait(5)  # `current` is about to be written, or has been
        remove(path)
        removed.set()

    def slow_write(path: str, data: bytes) -> None:
        if path.endswith("current"):
            if last == "roll back":
                ready.set()
                assert removed.wait(5)
                write(path, data)
            else:
                write(path, data)
                ready.set()
            return
        write(path, data)

    monkeypatch.setattr(store.files, "remove", slow_remove)
    monkeypatch.setattr(store.files, "write", slow_write)
    thread = threading.Thread(target=prune, args=(store, PruneConfig(keep=0)))
    thread.start()
    store.rollback(ALICE, old)
    thread.join()
    assert store.current(ALICE) == old
    assert store.fetch(ALICE, old)

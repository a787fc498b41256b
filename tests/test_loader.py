"""The loader: what it asks the store for, and how often, what it serves when the store fails."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_engine import adapter_bytes, tiny_basis, wait_until

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_config import LoaderConfig
from lorasb_runtime.adapters.names import AdapterName, parse_name
from lorasb_runtime.adapters.store import MAX_ADAPTER_BYTES, AdapterStore
from lorasb_runtime.errors import FileFormatError, NotFoundError, StoreError, TooLargeError
from lorasb_runtime.storage.adapter_file import version_of
from lorasb_runtime.storage.basis_file import Basis

ALICE, BOB = parse_name("alice"), parse_name("bob")
LIMITS = LoaderConfig(refresh=1.0, stale=10.0, timeout=5.0, patience=0.1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedStore(AdapterStore):
    """A store in memory whose reads can be counted, made to fail, and held up."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: list[AdapterName] = []
        self.fetched: list[str] = []
        self.error: Exception | None = None
        self.fetch_error: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.at_once = 0
        self.most_at_once = 0
        self._count = threading.Lock()

    def current(self, name: AdapterName) -> str:
        self.asked.append(name)
        self.open.wait(20)
        if self.error is not None:
            raise self.error
        return super().current(name)

    def fetch(self, name: AdapterName, version: str, limit: int = MAX_ADAPTER_BYTES) -> bytes:
        with self._count:
            self.fetched.append(version)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.open.wait(20)
            if self.fetch_error is not None:
                raise self.fetch_error
            return super().fetch(name, version, limit)
        finally:
            with self._count:
                self.at_once -= 1


@pytest.fixture
def basis() -> Basis:
    return tiny_basis()


@pytest.fixture
def store(tmp_path: Path) -> ScriptedStore:
    return ScriptedStore(f"memory://{tmp_path.name}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loader(store: ScriptedStore, basis: Basis, clock: Clock) -> AdapterLoader:
    return AdapterLoader(store, basis, LIMITS, clock=clock)


def publish(store: ScriptedStore, name: AdapterName, basis: Basis, value: float) -> str:
    """As another process would."""
    version = AdapterStore.publish(store, name, adapter_bytes(basis, value))
    store.asked.clear()
    store.fetched.clear()
    return version


def test_one_flight_for_a_version_across_names_and_threads(
    store: ScriptedStore, loader: AdapterLoader, basis: Basis
) -> None:
    version = publish(store, ALICE, basis, 1.0)
    publish(store, BOB, basis, 1.0)
    store.open.clear()
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(loader.get, name) for name in (ALICE, BOB) for _ in range(8)]
        wait_until(lambda: len(store.asked) == 2)
        store.open.set()
        loaded = [future.result(5) for future in waiting]
    assert {(a.name, a.version) for a in loaded} == {(ALICE, version), (BOB, version)}
    assert store.fetched == [version]
    assert store.asked.count(ALICE) == store.asked.count(BOB) == 1


def test_a_failed_flight_fails_its_waiters_and_is_forgotten(
    store: ScriptedStore, loader: AdapterLoader, basis: Basis
) -> None:
    publish(store, ALICE, basis, 1.0)
    store.open.clear()
    store.fetch_error = StoreError("no answer")
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(loader.get, ALICE) for _ in range(8)]
        wait_until(lambda: len(store.asked) == 1)
        store.open.set()
        errors = [future.exception(5) for future in waiting]
    assert {id(error) for error in errors} == {id(store.fetch_error)}
    store.fetch_error = None
    assert loader.get(ALICE).cores.tolist() == [1.0] * basis.size
    assert len(store.fetched) == 2


def test_a_bad_copy_under_one_name_does_not_take_the_other_with_it(
    store: ScriptedStore, loader: AdapterLoader, basis: Basis
) -> None:
    version = publish(store, ALICE, basis, 1.0)
    publish(store, BOB, basis, 1.0)
    store.files.write(store.path(ALICE, version), b"junk")
    store.open.clear()
    with ThreadPoolExecutor(2) as pool:
        alice = pool.submit(loader.get, ALICE)
        wait_until(lambda: len(store.asked) == 1)
        bob = pool.submit(loader.get, BOB)
        wait_until(lambda: len(store.asked) == 2)
        store.open.set()
        assert isinstance(alice.exception(5), FileFormatError) or alice.result().version == version
        assert bob.result(5).version == version


def test_fetches_at_once_are_bounded(store: ScriptedStore, basis: Basis) -> None:
    loader = AdapterLoader(store, basis, LoaderConfig(fetches=3))
    names = [parse_name(f"u{i}") for i in range(12)]
    for i, name in enumerate(names):
        publish(store, name, basis, float(i))
    with ThreadPoolExecutor(12) as pool:
        values = [a.cores[0].item() for a in pool.map(loader.get, names)]
    assert values == list(range(12))
    assert store.most_at_once <= 3


def test_unknown_names_are_asked_for_once_in_a_refresh(
    store: ScriptedStore, loader: AdapterLoader, basis: Basis, clock: Clock
) -> None:
    for _ in range(5):
        with pytest.raises(NotFoundError):
            loader.get(ALICE)
    assert len(store.asked) == 1 and loader.stats().negative_hits == 4
    loader.publish(ALICE, adapter_bytes(basis, 1.0))
    assert loader.get(ALICE).cores[0] == 1.0
    with pytest.raises(NotFoundError):
        loader.get(BOB)
    publish(store, BOB, basis, 2.0)
    clock.now += 1.0
    assert loader.get(BOB).cores[0] == 2.0


def test_unknown_names_take_no_more_room_than_allowed(store: ScriptedStore, basis: Basis) -> None:
    loader = AdapterLoader(store, basis, LoaderConfig(refresh=60.0, names=4))
    publish(store, ALICE, basis, 1.0)
    loader.get(ALICE)
    for i in range(10):
        with pytest.raises(NotFoundError):
            loader.get(parse_name(f"no{i}"))
    store.asked.clear()
    loader.get(ALICE)
    with pytest.raises(NotFoundError):
        loader.get(parse_name("no9"))
    assert store.asked == []
    with pytest.raises(NotFoundError):
        loader.get(parse_name("no0"))
    assert store.asked == [parse_name("no0")]


def test_a_publish_is_what_the_next_get_sees_whatever_is_in_the_air(
    store: ScriptedStore, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = AdapterLoader(store, basis, LoaderConfig(refresh=60.0))
    old = publish(store, ALICE, basis, 1.0)
    seen = threading.Event()
    original = store.current
    new: list[str] = []

    def current(name: AdapterName) -> str:
        found = original(name)
        if not seen.is_set():
            seen.set()
            wait_until(lambda: bool(new))  # the answer is on its way while another publishes
        return found

    monkeypatch.setattr(store, "current", current)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(loader.get, ALICE)
        assert seen.wait(5)
        published = loader.publish(ALICE, adapter_bytes(basis, 2.0)).version
        assert loader.get(ALICE).version == published
        new.append(published)
        assert slow.result(5).version == old
    assert loader.get(ALICE).version == published


def test_a_failing_store_leaves_what_is_cached_for_a_while(
    store: ScriptedStore,
    loader: AdapterLoader,
    basis: Basis,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    first = publish(store, ALICE, basis, 1.0)
    loader.get(ALICE)
    publish(store, ALICE, basis, 2.0)
    store.error = StoreError("no answer", transient=True)
    for clock.now in (1.0, 5.0, 9.9):
        assert loader.get(ALICE).version == first
    assert loader.stats().stale_served == 3 and loader.stats().failures >= 1
    with pytest.raises(StoreError, match="no answer"):
        loader.get(BOB)
    clock.now = 10.0
    with pytest.raises(StoreError, match="no answer"):
        loader.get(ALICE)
    store.error = None
    assert loader.get(ALICE).cores[0] == 2.0
    text = [r.message for r in caplog.records if "store memory" in r.message]
    assert len(text) == 2
    assert "serving cached versions" in text[0] and "answers again" in text[1]


def test_a_store_that_hangs_holds_cached_adapters_up_once(
    store: ScriptedStore, loader: AdapterLoader, basis: Basis, clock: Clock
) -> None:
    first = publish(store, ALICE, basis, 1.0)
    loader.get(ALICE)
    second = publish(store, ALICE, basis, 2.0)
    store.open.clear()
    clock.now = 1.0
    for _ in range(50):  # 50 times patience would be the test's time
        assert loader.get(ALICE).version == first
    assert len(store.asked) == 1
    store.open.set()
    wait_until(lambda: loader.get(ALICE).version == second)


def test_waiting_for_a_store_that_hangs_ends(store: ScriptedStore, basis: Basis) -> None:
    loader = AdapterLoader(store, basis, LoaderConfig(timeout=0.2, fetches=1))
    store.open.clear()
    with pytest.raises(StoreError, match=r"did not answer within 0\.2 s"):
        loader.get(ALICE)
    with pytest.raises(StoreError, match=r"did not answer within 0\.2 s"):
        asyncio.run(loader.load(BOB))
    with pytest.raises(StoreError, match=r"did not answer within 0\.2 s"):
        asyncio.run(loader.workers.call(store.current, ALICE))
    store.open.set()
    publish(store, ALICE, basis, 1.0)
    wait_until(lambda: _gets(lambda: loader.get(ALICE)))
    assert asyncio.run(loader.load(ALICE)).cores[0] == 1.0
    assert BOB not in store.asked  # whoever wanted it had left when its turn came


def _gets(get: Callable[[], object]) -> bool:
    try:
        get()
    except (NotFoundError, StoreError):
        return False
    return True


def test_a_version_replaced_while_it_is_read(
    store: ScriptedStore, loader: AdapterLoader, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = publish(store, ALICE, basis, 1.0)
    original = store.current
    answers = [old]
    new = publish(store, ALICE, basis, 2.0)
    store.files.remove(store.path(ALICE, old))
    monkeypatch.setattr(store, "current", lambda name: answers.pop() if answers else original(name))
    assert loader.get(ALICE).version == new
    store.files.remove(store.path(ALICE, new))
    other = AdapterLoader(store, basis, LIMITS)
    with pytest.raises(StoreError, match="is not in the store"):
        other.get(ALICE)


def test_an_oversized_file_is_not_read_to_its_end(
    store: ScriptedStore, loader: AdapterLoader, basis: Basis
) -> None:
    data = b"x" * (4 * basis.size + (1 << 20) + 1)
    AdapterStore.publish(store, ALICE, data)
    with pytest.raises(TooLargeError, match="expected at most that"):
        loader.get(ALICE)


def test_prefetch_leaves_fetches_for_requests(store: ScriptedStore, basis: Basis) -> None:
    loader = AdapterLoader(store, basis, LoaderConfig(fetches=4))
    names = [parse_name(f"u{i}") for i in range(20)]
    for i, name in enumerate(names):
        publish(store, name, basis, float(i))
    store.open.clear()
    done = loader.prefetch([*names, parse_name("missing")])
    wait_until(lambda: len(store.asked) == 2)
    assert not done.done()
    store.open.set()
    assert done.result(10) == 20
    assert store.most_at_once <= 2
    assert loader.stats().cached == 20
    store.asked.clear()
    assert loader.get(names[3]).cores[0] == 3.0
    assert store.asked == []


def test_the_counters(store: ScriptedStore, basis: Basis, clock: Clock) -> None:
    loader = AdapterLoader(store, basis, LIMITS, clock=clock)
    publish(store, ALICE, basis, 1.0)
    for _ in range(3):
        loader.get(ALICE)
    clock.now = 1.0
    loader.get(ALICE)
    size = len(adapter_bytes(basis, 1.0))
    stats = loader.stats()
    assert (stats.hits, stats.misses, stats.fetches, stats.bytes_fetched) == (3, 1, 1, size)
    assert (stats.cached, stats.cached_bytes) == (1, 4 * basis.size)
    assert stats.fetch_counts[-1] == 1 and stats.fetch_seconds > 0


def test_a_version_stays_in_memory_while_a_known_name_has_it(
    store: ScriptedStore, loader: AdapterLoader, basis: Basis, clock: Clock
) -> None:
    def kept(*names: AdapterName) -> int:
        clock.now += 1.0
        for name in names:
            loader.get(name)
        return loader.stats().cached

    publish(store, ALICE, basis, 1.0)
    publish(store, BOB, basis, 1.0)
    assert kept(ALICE, BOB) == 1
    publish(store, ALICE, basis, 2.0)
    assert kept(ALICE, BOB) == 2 and len(store.fetched) == 1
    publish(store, BOB, basis, 2.0)
    assert kept(BOB, ALICE) == 1 and store.fetched == []
    loader.publish(BOB, adapter_bytes(basis, 3.0))
    assert kept(ALICE, BOB) == 2
    loader.rollback(BOB, None)
    assert kept(ALICE, BOB) == 1
    loader.delete(BOB)
    assert kept(ALICE) == 1
    AdapterStore.delete(store, ALICE)
    with pytest.raises(NotFoundError):
        kept(ALICE)
    assert loader.stats().cached == loader.stats().cached_bytes == 0


def test_the_disk_cache_outlives_the_loader_and_spares_the_store(
    store: ScriptedStore, basis: Basis, tmp_path: Path
) -> None:
    config = LoaderConfig(disk_cache=tmp_path / "cache")
    version = publish(store, ALICE, basis, 1.0)
    AdapterLoader(store, basis, config).get(ALICE)
    again = AdapterLoader(store, basis, config)
    assert again.get(ALICE).version == version
    assert store.fetched == [version] and again.stats().disk_hits == 1
    file = tmp_path / "cache" / f"{version}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    third = AdapterLoader(store, basis, config)
    assert third.get(ALICE).cores[0] == 1.0
    assert store.fetched == [version] * 2
    assert version_of(file.read_bytes()) == version


def test_evicted_cores_are_served_from_disk_while_the_store_is_down(
    store: ScriptedStore, basis: Basis, clock: Clock, tmp_path: Path
) -> None:
    config = LoaderConfig(cache_bytes=1, disk_cache=tmp_path / "cache", stale=10.0)
    loader = AdapterLoader(store, basis, config, clock=clock)
    loader.publish(ALICE, adapter_bytes(basis, 1.0))
    loader.publish(BOB, adapter_bytes(basis, 2.0))
    store.error = StoreError("down")
    clock.now = 1.0
    assert loader.get(ALICE).cores[0] == 1.0

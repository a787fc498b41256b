"""Publishing processes killed at random moments: readers never see half a version."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from buckets import BUCKET, KEYS, s3_service
from fake_engine import adapter_bytes, tiny_basis

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.prune import PruneConfig, prune
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import NotFoundError

ALICE = parse_name("alice")
KILLS = 40
BUCKET_KILLS = 12  # each publisher takes half a second to connect
FILES = 4

# Each child is forked from one process, which has imported torch already.
PUBLISHER = """
import os, random, signal, sys, time
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
url, *paths = sys.argv[1:]
files = [open(path, "rb").read() for path in paths]
for line in sys.stdin:
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        draw = random.Random(line)
        store = AdapterStore(url)
        store.current(parse_name("alice"))  # which connects
        os.write(begin, b"x")
        while True:
            store.publish(parse_name("alice"), draw.choice(files))
    os.read(begun, 1)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(begun)
    os.close(begin)
    print("killed", flush=True)
"""


@contextmanager
def publisher(url: str, files: list[Path]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, url, *map(str, files)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()
        assert process.wait(30) == 0


def kill_one(process: "subprocess.Popen[str]", after: float) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(f"{after}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "killed\n"


@contextmanager
def reading(store: AdapterStore, known: dict[str, bytes]) -> Iterator[None]:
    """Reads all the while, and fails at the end if a reader saw anything but whole versions."""
    done = threading.Event()
    failures: list[BaseException] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            try:
                version = store.current(ALICE)
                assert store.fetch(ALICE, version) == known[version]
                reads += 1
            except BaseException as error:
                failures.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        done.set()
        reader.join()
    assert not failures and reads > 0


def run(url: str, tmp_path: Path, kills: int) -> AdapterStore:
    store = AdapterStore(url)
    data = [adapter_bytes(tiny_basis(), float(i)) for i in range(FILES)]
    known = {store.publish(ALICE, each): each for each in data}
    files = [tmp_path / str(i) for i in range(FILES)]
    for file, each in zip(files, data, strict=True):
        file.write_bytes(each)
    draw = random.Random(0)
    with publisher(url, files) as process, reading(store, known):
        for _ in range(kills):
            kill_one(process, draw.uniform(0.001, 0.05))
            version = store.current(ALICE)
            assert store.fetch(ALICE, version) == known[version]
    return store


def test_kills_on_a_folder_and_what_they_leave(tmp_path: Path) -> None:
    folder = tmp_path / "store" / "default" / "alice"
    store = run(str(tmp_path / "store"), tmp_path, KILLS)
    (folder / ".current.left.tmp").write_text("half")
    before = {file for file in os.listdir(folder) if file.endswith(".tmp")}
    young = PruneConfig(keep=FILES)
    assert prune(store, young).leftovers == ()  # it could still be somebody's
    later = prune(store, young, now=lambda: time.time() + 3700)
    assert {Path(path).name for path in later.leftovers} == before
    assert [file for file in os.listdir(folder) if file.endswith(".tmp")] == []
    assert store.fetch(ALICE, store.current(ALICE))


def test_kills_on_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_service() as address:
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{address}"}.items():
            monkeypatch.setenv(key, value)
        run(f"s3://{BUCKET}/store", tmp_path, BUCKET_KILLS)


def test_a_first_publishing_that_was_killed_is_pruned_in_the_end(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path))
    version = store.publish(ALICE, b"data")
    store.files.remove(f"{store.folder(ALICE)}/current")
    assert prune(store, PruneConfig(keep=0)).versions == ()
    report = prune(store, PruneConfig(keep=9), now=lambda: time.time() + 3700)
    assert [v.version for v in report.versions] == [version]
    with pytest.raises(NotFoundError):
        store.fetch(ALICE, version)
    assert list((tmp_path / "default").iterdir()) == []

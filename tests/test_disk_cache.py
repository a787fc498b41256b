"""The disk cache: its size, its order, damage, and several processes on one folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasb_runtime.adapters.disk_cache import DiskCache
from lorasb_runtime.errors import InputError
from lorasb_runtime.storage.adapter_file import version_of


def put(cache: DiskCache, data: bytes) -> str:
    version = version_of(data)
    cache.put(version, data)
    return version


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())


def test_the_files_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    versions = [put(cache, bytes([i]) * 100) for i in range(10)]
    for age, version in enumerate(versions):
        os.utime(tmp_path / f"{version}.safetensors", (1000 + age, 1000 + age))
    assert cache.get(versions[0]) == bytes([0]) * 100  # now the one used last
    put(cache, b"x" * 200)
    assert [cache.get(v) is None for v in versions] == [False, True, True, *[False] * 7]
    assert size(tmp_path) <= 1000


def test_damage_is_found_and_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    version = put(cache, b"good")
    file = tmp_path / f"{version}.safetensors"
    for bad in (b"goo", b"bad!", b""):
        file.write_bytes(bad)
        assert cache.get(version) is None and not file.exists()
        put(cache, b"good")
    assert cache.get(version) == b"good"


def test_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    old, new = tmp_path / ".dead.1.tmp", tmp_path / ".alive.1.tmp"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    put(DiskCache(tmp_path, 1000), b"x")
    assert not old.exists() and new.exists()


def test_a_disk_that_fails_costs_no_request(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1000)
    (tmp_path / "cache").rmdir()
    version = put(cache, b"data")
    assert cache.get(version) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="disk cache"):
        DiskCache(tmp_path / "file", 1000)


WORK = """
import random, sys
from pathlib import Path
from lorasb_runtime.adapters.disk_cache import DiskCache
from lorasb_runtime.storage.adapter_file import version_of
cache = DiskCache(Path(sys.argv[1]), 20_000)
files = [bytes([i]) * 500 for i in range(100)]
draw = random.Random(int(sys.argv[2]))
for _ in range(1500):
    data = draw.choice(files)
    found = cache.get(version_of(data))
    assert found in (None, data)
    if found is None:
        cache.put(version_of(data), data)
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WORK, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(2)
    ]
    for process in running:
        assert process.communicate(timeout=60) == (None, "")
        assert process.returncode == 0
    assert 0 < size(tmp_path) <= 20_000 * 1.1

"""Compiling the CPU kernels: once for each machine, into a private folder, or not at all."""

import logging
import os
import platform
import subprocess
from pathlib import Path

import pytest

from lorasb_runtime.ops import cpu_library as library_module
from lorasb_runtime.ops.cpu_library import SOURCES, build_library, cache_folder, cpu_library


def test_it_is_compiled_once_and_anew_for_other_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "FLAGS", QUICK)
    build_library(tmp_path)
    (built,) = tmp_path.iterdir()
    made = built.stat().st_mtime_ns
    build_library(tmp_path)
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [made]
    monkeypatch.setattr(library_module, "FLAGS", (*QUICK, "-DOTHER"))
    build_library(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


QUICK = tuple("-O0" if flag == "-O3" else flag for flag in library_module.FLAGS)
X86 = ["x86-64-v3", "x86-64-v4"] if platform.machine() == "x86_64" else []


@pytest.mark.parametrize("cpu", ["native", *X86])
def test_the_sources_compile_without_a_warning(cpu: str, tmp_path: Path) -> None:
    flags = [f for f in QUICK if not f.startswith("-march")]
    command = ["c++", *flags, f"-march={cpu}", "-Wall", "-Wextra", "-Werror"]
    for source in sorted(SOURCES.glob("*.cpp")):
        done = subprocess.run(
            [*command, str(source), "-o", str(tmp_path / "out.so")], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_without_a_compiler_a_warning_says_what_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cpu_library.__wrapped__() is None
    (record,) = caplog.records
    assert "CPU kernels are not used" in record.message and "C++ compiler" in record.message


def test_a_source_that_does_not_compile_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "FLAGS", (*library_module.FLAGS, "-Dbf16=+"))
    with pytest.raises(subprocess.CalledProcessError):
        build_library(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that others may write to could hold anybody's code."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = cache_folder()
    assert folder == tmp_path / ".cache" / "lorasb" and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    other = cache_folder()
    assert other != folder and other.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", os.devnull)
    assert cache_folder() == other

"""Compiles the CPU kernels of `ops/cpu` for this machine, once, and loads them.

That needs a C++ compiler (`c++`); what it makes is kept in the user's cache folder. Without one a
warning says so, and torch's own operations do the same work, slower.
"""

import ctypes
import hashlib
import logging
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpu")
# OpenMP's threads are torch's own: its libgomp has the name that the library asks for.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
# Instructions that an operating system may keep from a process on a CPU that has them.
WITHOUT_TILES = ("-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")
SECONDS = 120  # for one run of the compiler
# As the functions' names have them.
DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@cache
def cpu_library() -> ctypes.CDLL | None:
    """The kernels, compiled by the first process that asks; None where that cannot be done."""
    if os.name != "posix":
        return None
    try:
        library = build_library(cache_folder())
        allowed = ctypes.c_int64()
        library.kernels_allowed(ctypes.byref(allowed))
        return library if allowed.value else build_library(cache_folder(), WITHOUT_TILES)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "the CPU kernels are not used, torch's slower operations are (is a C++ compiler "
            "installed?): %s",
            " ".join(detail.split())[:300],
        )
        return None


def cpu_function(
    name: str, dtypes: Sequence[torch.dtype], device: torch.device, arguments: Sequence[Any]
) -> Callable[..., None] | None:
    """The library's function `name` for these dtypes; None for others, and on other devices.

    Also where the library has none of that name, as for a CPU without AMX's tiles. arguments:
    ctypes' types.
    """
    if device.type != "cpu" or not all(dtype in DTYPE_NAMES for dtype in dtypes):
        return None
    library = cpu_library()
    if library is None:
        return None
    function = getattr(library, "_".join([name, *(DTYPE_NAMES[d] for d in dtypes)]), None)
    if function is None:
        return None
    function.argtypes, function.restype = arguments, None
    found: Callable[..., None] = function
    return found


def build_library(folder: Path, more: Sequence[str] = ()) -> ctypes.CDLL:
    """Load the library of these sources from `folder`, compiling it where it is not there yet.

    more: flags after the usual ones. Raises OSError or subprocess.SubprocessError when it can be
    neither compiled nor loaded.
    """
    command = ["c++", *FLAGS, *more]
    sources = sorted(SOURCES.glob("*.cpp"))
    path = folder / f"{_digest(command)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            _run([*command, *map(str, sources), "-o", str(built)])
            built.replace(path)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    """Where compiled kernels are kept: a folder that nobody else can write to."""
    try:
        folder = Path.home() / ".cache" / "lorasb"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        private = not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid == os.getuid() and private and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass  # a home that cannot be written to, or none
    return Path(_own_folder().name)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Of this process alone, gone when it ends."""
    return tempfile.TemporaryDirectory(prefix="lorasb-")


def _digest(command: list[str]) -> str:
    """Of everything that decides the library: sources, flags, compiler, and what CPU it sees."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    digest.update("\0".join(command).encode())
    # What `-march=native` stands for here, and the compiler's version.
    digest.update(_run([*command, "-E", "-x", "c++", "-###", os.devnull]).encode())
    return digest.hexdigest()[:32]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    return done.stderr

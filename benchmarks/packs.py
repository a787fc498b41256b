"""What a server pays for starting with a pack of many adapters: time to ready, and memory.

    python benchmarks/packs.py models/SmolLM2-135M-Instruct --adapters 100000

The adapters are random; the pack is written to --folder (10.8 GB for 100,000 of rank 16) and
removed at the end. The same server without a pack is measured beside it.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from server_process import serving
from swap_files import Versions, make_basis, make_variant

from lorasb_runtime.engines.torch.bench import machine
from lorasb_runtime.storage.pack_file import write_pack


def main() -> None:
    parser = argparse.ArgumentParser(description="a server on a pack")
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=300, help="each for another adapter")
    parser.add_argument("--folder", type=Path, help="where the pack goes for a while")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for key, value in (measure(options, Path(folder)) | machine()).items():
            print(f"{key:<44} {value}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    basis = make_basis(options.model, options.rank, folder / "basis")
    versions = Versions(basis, make_variant(basis, 0, 0.01))
    names = [f"user-{i:07}" for i in range(options.adapters)]
    began = time.monotonic()
    write_pack(folder / "pack", names, versions.file, lambda _: None)
    result: dict[str, Any] = {
        "adapters": options.adapters,
        "pack, GB": round((folder / "pack").stat().st_size / 1e9, 2),
        "seconds to write it": round(time.monotonic() - began, 1),
    }
    flags = ["--basis", folder / "basis"]
    with measured(folder, options.model, *flags) as (_, bare):
        pass
    result |= {f"without a pack: {key}": value for key, value in bare.items()}
    with measured(folder, options.model, *flags, "--pack", folder / "pack") as (url, packed):
        result |= {f"with it: {key}": value for key, value in packed.items()}
        result |= use(url, names[:: max(1, len(names) // options.requests)])
    return result


@contextmanager
def measured(folder: Path, *words: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server, and what it took until it was ready."""
    began = time.monotonic()
    with serving(folder / "log", *words) as url:
        taken = time.monotonic() - began
        yield url, {"seconds to ready": round(taken, 1), **memory()}


def use(url: str, names: list[str]) -> dict[str, Any]:
    """Ask each adapter for one token, then list them all."""
    began = time.monotonic()
    for name in names:
        body = {"model": name, "prompt": "Hello", "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
    each = (time.monotonic() - began) / len(names)
    after = {f"after {len(names)} of them: {key}": value for key, value in memory().items()}
    began = time.monotonic()
    listed = httpx.get(f"{url}/v1/adapters", timeout=600).raise_for_status().json()["data"]
    return {
        **after,
        "ms a request of one token, one by one": round(1000 * each, 1),
        f"seconds to list {len(listed)} adapters": round(time.monotonic() - began, 2),
    }


def memory() -> dict[str, Any]:
    """MiB of the server: its own, and of mapped files (which the system may drop)."""
    (server,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    lines = dict(x.split(":", 1) for x in Path(f"/proc/{server}/status").read_text().splitlines())
    return {
        "own memory, MiB": int(lines["RssAnon"].split()[0]) // 1024,
        "mapped files, MiB": int(lines["RssFile"].split()[0]) // 1024,
    }


if __name__ == "__main__":
    main()

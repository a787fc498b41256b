"""What the hot-swap benchmark runs against: random files for a model, and a server process."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import torch

from lorasb_runtime.engines.torch.bench import random_basis
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.storage.adapter_file import Adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis

LORASB = (sys.executable, "-c", "from lorasb_tools.cli import main; main()")
START_SECONDS = 300


def make_basis(model: Path, rank: int, path: Path) -> Basis:
    """A random basis for the model, also written to `path`."""
    torch.manual_seed(0)
    basis = random_basis(load_causal_lm(model), rank)
    save_basis(basis, path)
    return basis


def make_variant(basis: Basis, variant: int, strength: float) -> torch.Tensor:
    """Cores [D] of normal noise, in the dtype that adapters are usually kept in."""
    generator = torch.Generator().manual_seed(variant)
    return (strength * torch.randn(basis.size, generator=generator)).bfloat16()


def adapter_file(basis: Basis, cores: torch.Tensor, serial: int) -> bytes:
    """An adapter file; each serial makes a version of its own of the same cores."""
    return serialize_adapter(Adapter(cores, basis.digest, info={"serial": serial}))


@contextmanager
def serving(log: Path, *words: object) -> Iterator[str]:
    """`lorasb serve` as a process of its own; yields its URL once it is ready."""
    command = [*LORASB, "serve", *map(str, words), "--port", "0"]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            yield _wait(process, log)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        url = log.read_text().partition("serving on ")[2].partition("\n")[0]
        with suppress(httpx.TransportError):
            if url and httpx.get(f"{url}/ready").status_code == 200:
                return url
        time.sleep(0.1)
    raise SystemExit(f"the server did not get ready:\n{log.read_text()}")

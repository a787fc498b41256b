"""Models that tests share, made or found once per run."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from pico import make_pico_gpt2, make_pico_llama
from sites import Site, opened
from vllm_native import native, vllm_adapters, vllm_basis, vllm_basis_file, vllm_model

from lorasb_tools import cli

# Fixtures of other files, for pytest to find here.
__all__ = ["native", "vllm_adapters", "vllm_basis", "vllm_basis_file", "vllm_model"]

Run = Callable[..., tuple[int, str, str]]

# Taken out of the environment: servers refuse variables of this prefix that are no settings.
REAL_MODEL = os.environ.pop("LORASB_TEST_MODEL", None)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `lorasb` with these words in this process; gives the exit status, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorasb", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def engine(pico: Path) -> FakeEngine:
    """A fake; files that need another engine have a fixture of their own."""
    return FakeEngine.of(pico)


@pytest.fixture
def site(tmp_path: Path, engine: FakeEngine) -> Iterator[Site]:
    with opened(tmp_path, engine) as site:
        yield site


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama."""
    return make_pico_llama(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="session")
def pico_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama whose context takes many seconds to fill."""
    folder = tmp_path_factory.mktemp("models") / "pico-long"
    return make_pico_llama(folder, max_position_embeddings=16384)


@pytest.fixture(scope="session")
def pico_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer GPT-2."""
    return make_pico_gpt2(tmp_path_factory.mktemp("models") / "pico-gpt2")


@pytest.fixture(scope="session")
def smol() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, named by LORASB_TEST_MODEL."""
    if not REAL_MODEL:
        pytest.skip("LORASB_TEST_MODEL names no model folder")
    return Path(REAL_MODEL).resolve()

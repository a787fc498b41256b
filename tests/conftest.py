"""Models that tests share, made or found once per run."""

import os
from pathlib import Path

import pytest
from pico import make_pico_gpt2, make_pico_llama


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama."""
    return make_pico_llama(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="session")
def pico_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer GPT-2."""
    return make_pico_gpt2(tmp_path_factory.mktemp("models") / "pico-gpt2")


@pytest.fixture(scope="session")
def smol() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, named by LORASB_TEST_MODEL."""
    folder = os.environ.get("LORASB_TEST_MODEL")
    if not folder:
        pytest.skip("LORASB_TEST_MODEL names no model folder")
    return Path(folder).resolve()
